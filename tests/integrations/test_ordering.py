"""The token order once a model: tokens are moved once and the output is what it was before."""

import dataclasses

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from models import HUNYUAN, LEVEL1, NAMES, SPARSE, WAN, build, perturbed, times, video  # noqa: E402

from psa_torch.integrations.diffusers import FAMILIES, apply  # noqa: E402
from psa_torch.integrations.model import prefix_lengths  # noqa: E402
from psa_torch.integrations.ordering import Moves, tokens  # noqa: E402


def run(model, arguments, keywords):
    with torch.no_grad():
        return model(*arguments, **keywords).sample


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def with_order(config, method):
    return dataclasses.replace(config, rearrange_method=method)


@pytest.mark.parametrize("name", NAMES)
def test_a_sparse_forward_is_the_same_with_moves_in_every_layer(name):
    """Unlike level 1 this tells apart blocks of tokens, and so whether they were in order."""
    model, *call = build(name)
    with apply(model, config=SPARSE, order="layer") as psa:
        expected = run(model, *call)
        assert "order='layer'" in psa.table()
    with apply(model, config=with_order(SPARSE, None)):
        unordered = run(model, *call)
    assert relative(unordered, expected) > 1e-4
    with apply(model, config=SPARSE) as psa:
        assert relative(run(model, *call), expected) < 1e-5
        assert "inside each layer" not in psa.table()
        assert all(layer.calls["sparse"] for layer in psa.layers)


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_tiles_are_a_fixed_order_too(name):
    model, *call = build(name)
    config = dataclasses.replace(SPARSE, rearrange_method="STA", tile_size=(3, 4, 4))
    with apply(model, config=config, order="layer"):
        expected = run(model, *call)
    with apply(model, config=config) as psa:
        assert relative(run(model, *call), expected) < 1e-5
        assert "inside each layer" not in psa.table()


def test_dense_layers_and_steps_among_sparse_ones():
    model, arguments, _ = build("wan-ti2v")
    dense = run(model, arguments, {})
    with apply(model, config=LEVEL1, dense_layers=[1], warmup_steps=1) as psa:
        psa.step = 0
        assert torch.equal(run(model, arguments, {}), dense)  # nothing is moved
        psa.step = 1
        assert relative(run(model, arguments, {}), dense) < 1e-5
        assert [layer.calls["sparse"] for layer in psa.layers] == [1, 0]


@pytest.mark.parametrize("name", ["wan", "cogvideox", "ltx"])
def test_a_table_left_out_of_the_route_is_seen(name):
    """What the level 1 tests rest on: a mistake in a route changes the output."""
    model, *call = build(name)
    dense = run(model, *call)
    family = FAMILIES[name]
    route = family.route
    tables = dict(route.outputs), dict(route.arguments)
    for table in tables:
        table.pop("rope", None), table.pop("image_rotary_emb", None)
    wrong = dataclasses.replace(
        family, route=dataclasses.replace(route, outputs=tables[0], arguments=tables[1])
    )
    with apply(model, config=LEVEL1, family=wrong):
        assert relative(run(model, *call), dense) > 1e-4


def gradients(model, call):
    model.zero_grad()
    x = call[0][0].clone().requires_grad_()
    model(x, *call[0][1:], **call[1]).sample.square().sum().backward()
    return torch.cat([x.grad.flatten(), *(p.grad.flatten() for p in model.parameters())])


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_gradients_and_checkpointing(name):
    model, *call = build(name)
    model.train()
    dense = gradients(model, call)
    with apply(model, config=SPARSE, order="layer"):
        sparse = gradients(model, call)
    model.enable_gradient_checkpointing()
    with apply(model, config=LEVEL1):
        assert relative(gradients(model, call), dense) < 1e-5
    with apply(model, config=SPARSE):
        assert relative(gradients(model, call), sparse) < 1e-5
        with torch.inference_mode():  # permutations made here serve a gradient later
            model(*build(name)[1], **call[1])
        assert relative(gradients(model, call), sparse) < 1e-5


def why(psa):
    first = psa.table().splitlines()[0]
    return first.partition("inside each layer: ")[2]


def test_where_a_forward_cannot_be_in_order_layers_move_tokens_and_say_why():
    model, arguments, _ = build("wan")
    dense = run(model, arguments, {})
    with apply(model, config=with_order(LEVEL1, "SemanticAware")) as psa:
        assert relative(run(model, arguments, {}), dense) < 1e-5
        assert why(psa) == "SemanticAware is no fixed order"
    free = dataclasses.replace(FAMILIES["wan"], route=None)
    with apply(model, config=LEVEL1, family=free) as psa:
        assert relative(run(model, arguments, {}), dense) < 1e-5
        assert why(psa) == "the family names no route"
    with apply(model, config=LEVEL1, family="wan-vace") as psa:
        assert relative(run(model, arguments, {}), dense) < 1e-5
        assert why(psa) == "the model has no vace_patch_embedding"
    model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.0))
    with apply(model, config=LEVEL1) as psa, model.cache_context("cond"):
        run(model, arguments, {})
        assert why(psa).startswith("a cache keeps")


def test_control_of_another_size_keeps_moves_in_the_layers():
    model, arguments, _ = build("wan-vace")
    keywords = {"control_hidden_states": video(frames=3, channels=8)}
    dense = run(model, arguments, keywords)
    with apply(model, config=LEVEL1) as psa:
        assert relative(run(model, arguments, keywords), dense) < 1e-5
        assert why(psa) == "control and video differ in size"


def test_a_first_frame_treated_apart_keeps_moves_in_the_layers():
    model = diffusers.HunyuanVideoTransformer3DModel(
        **HUNYUAN,
        patch_size=2,
        num_layers=1,
        num_single_layers=1,
        guidance_embeds=False,
        pooled_projection_dim=8,
        image_condition_type="token_replace",
    )
    mask = torch.arange(12)[None] < torch.tensor([[9], [9]])
    call = (video(), times(), torch.randn(2, 12, 16), mask, torch.randn(2, 8)), {}
    model = perturbed(model)
    dense = run(model, *call)
    with apply(model, config=LEVEL1) as psa:
        assert relative(run(model, *call), dense) < 1e-5
        assert why(psa).startswith("the tokens of the first frame")


def test_frames_that_see_earlier_frames_only_stay_as_they_are():
    model = perturbed(diffusers.SkyReelsV2Transformer3DModel(**WAN, num_frame_per_block=5))
    call = (video(frames=10), times(), torch.randn(2, 12, 16)), {}
    dense = run(model, *call)
    with apply(model, config=LEVEL1) as psa, pytest.warns(RuntimeWarning, match="not a prefix"):
        assert torch.equal(run(model, *call), dense)
        assert "see earlier frames only" in psa.table()


def test_what_would_go_wrong_in_silence_is_refused():
    model, arguments, _ = build("wan")
    family = FAMILIES["wan"]
    route = dataclasses.replace(family.route, outputs={**family.route.outputs, "blocks": tokens(1)})
    with apply(model, config=LEVEL1, family=dataclasses.replace(family, route=route)):
        with pytest.raises(RuntimeError, match="did not call blocks"):
            run(model, arguments, {})
    model = perturbed(diffusers.SkyReelsV2Transformer3DModel(**WAN, num_frame_per_block=5))
    sky = dataclasses.replace(FAMILIES["skyreels-v2"], route=family.route)
    for dense_layers in ((), [0, 1][:1]):
        with apply(model, config=LEVEL1, family=sky, dense_layers=dense_layers):
            with pytest.raises(RuntimeError, match="a mask over tokens that are in order"):
                run(model, (video(frames=10), *arguments[1:]), {})
    with pytest.raises(ValueError, match="order must be 'model' or 'layer', got 'block'"):
        apply(model, config=LEVEL1, order="block")
    with pytest.raises(ValueError, match="11 tokens where the token order has 12"):
        Moves("Gilbert", (1, 3, 4), (1, 1, 1)).into(torch.randn(2, 11, 3), 1)


def test_a_mask_is_a_prefix_only_if_every_valid_query_sees_the_same_first_keys():
    valid = torch.arange(6) < torch.tensor([[4], [6]])
    keys, square = valid[:, None, None], valid[:, None, :, None] & valid[:, None, None]
    for mask in (keys, square, square.expand(2, 3, 6, 6), square | ~valid[:, None, :, None] & keys):
        assert prefix_lengths(mask, 2, 6) == [4, 6]
    assert prefix_lengths(keys[:1], 2, 6) == [4, 4]
    one_less = square.clone()
    one_less[0, 0, 2, 3] = False
    heads = torch.cat([square, square[:1].expand(2, 1, 6, 6)], 1)
    later, nothing = keys.flip(-1), torch.zeros_like(keys)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    for mask in (one_less, heads, later, nothing, causal):
        assert prefix_lengths(mask, 2, 6) is None


def test_moves_are_the_order_and_come_back():
    grid, text = (3, 4, 5), 7
    moves = Moves("Gilbert", grid, (1, 1, 1))
    x = torch.randn(2, text + 60, 3)
    into = moves.into(x, 1, text)
    from shared_specs.order import gilbert_order

    assert torch.equal(into[:, :text], x[:, :text])
    assert torch.equal(into[:, text:], x[:, text:][:, torch.tensor(gilbert_order(grid))])
    assert torch.equal(moves.back(into[:, text:], 1), x[:, text:])
