"""PSAVideoAttention: warm-up, token order with warm start, records, cross-attention, presets."""

import copy

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from psa_torch import psa_attention, video
from psa_torch.order import TokenOrder
from psa_torch.video import PSAVideoAttention, VideoState, head_density
from shared_specs import PSAConfig, presets
from shared_specs import masks as spec_masks
from shared_specs.records import DensityRecords
from shared_specs.selection import candidate_blocks
from tests.video_reference import reference

GRID, TEXT = (4, 8, 16), 20
LENGTH = 4 * 8 * 16 + TEXT


def make_qkv(rng, length=LENGTH, kv_length=None, heads=4, kv_heads=2, dim=16):
    def tensor(count, tokens):
        return torch.from_numpy(rng.normal(size=(1, count, tokens, dim))).float()

    kv_length = kv_length or length
    return tensor(heads, length), tensor(kv_heads, kv_length), tensor(kv_heads, kv_length)


def config_of(method, **fields):
    return PSAConfig(rearrange_method=method, grid=GRID, text_length=TEXT, **fields)


def dense(q, k, v, **options):
    return scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)


@pytest.mark.parametrize("method", [None, "Gilbert", "STA", "Clusters", "SemanticAware", "Hybrid"])
def test_a_sparse_step_is_psa_attention(rng, method):
    config = config_of(method)
    qkv = make_qkv(rng)
    module = PSAVideoAttention(config, warmup_steps=2)
    out, lse = module(*qkv, step=2, return_lse=True)
    expected, expected_lse = psa_attention(*qkv, config=config, return_lse=True)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    assert (out - dense(*qkv)).abs().max() > 1e-3


def test_warm_up_steps_are_dense(rng):
    qkv = make_qkv(rng)
    module = PSAVideoAttention(config_of("Gilbert", scale=0.3), warmup_steps=3)
    for step in range(3):
        assert torch.equal(module(*qkv, step=step), dense(*qkv, scale=0.3))
    assert not torch.equal(module(*qkv, step=3), dense(*qkv, scale=0.3))
    out, lse = module(*qkv, step=0, return_lse=True)
    torch.testing.assert_close(out, dense(*qkv, scale=0.3), atol=1e-5, rtol=0)
    logits = 0.3 * qkv[0] @ qkv[1].repeat_interleave(2, 1).mT
    torch.testing.assert_close(lse, logits.logsumexp(-1), atol=1e-5, rtol=0)


def test_the_step_comes_from_the_state_or_the_argument(rng):
    qkv = make_qkv(rng)
    state = VideoState()
    layers = [PSAVideoAttention(config_of(None), warmup_steps=1, state=state) for _ in range(2)]
    assert all(torch.equal(layer(*qkv), dense(*qkv)) for layer in layers)
    assert all(torch.equal(layer(*qkv), dense(*qkv)) for layer in layers)  # calls do not count
    state.step = 1
    assert not any(torch.equal(layer(*qkv), dense(*qkv)) for layer in layers)
    assert torch.equal(layers[0](*qkv, step=0), dense(*qkv))


def test_a_missing_or_bad_step_is_refused(rng):
    qkv = make_qkv(rng)
    module = PSAVideoAttention(config_of(None), warmup_steps=1)
    with pytest.raises(ValueError, match="step must be given with warmup_steps=1"):
        module(*qkv)
    for step in (True, 1.0, torch.tensor(1)):
        with pytest.raises(TypeError, match="step must be an integer"):
            module(*qkv, step=step)
    with pytest.raises(ValueError, match="step must be at least 0, got -1"):
        module(*qkv, step=-1)
    with pytest.raises(ValueError, match="warmup_steps must be at least 0"):
        PSAVideoAttention(warmup_steps=-1)
    with pytest.raises(TypeError, match="config must be a PSAConfig"):
        PSAVideoAttention({"block_m": 128})
    PSAVideoAttention(config_of(None))(*qkv)


def test_cross_attention_is_dense(rng):
    state = VideoState(step=9)
    module = PSAVideoAttention(config_of("Gilbert"), warmup_steps=1, state=state)
    other = make_qkv(rng, kv_length=77)
    assert torch.equal(module(*other), dense(*other))
    same_length = make_qkv(rng)
    assert torch.equal(module(*same_length, cross_attention=True), dense(*same_length))
    out, lse = module(*other, return_lse=True)
    torch.testing.assert_close(out, dense(*other), atol=1e-5, rtol=0)
    assert lse.shape == other[0].shape[:3]
    assert len(state.records) == 0


def test_causal_calls_with_a_longer_past_are_sparse(rng):
    config = PSAConfig(causal=True)
    qkv = make_qkv(rng, length=300, kv_length=700)
    module = PSAVideoAttention(config, warmup_steps=1)
    assert torch.equal(module(*qkv, step=1), psa_attention(*qkv, config=config))
    position = torch.arange(300)[:, None] + 400
    visible = torch.arange(700)[None] <= position
    torch.testing.assert_close(
        module(*qkv, step=0), dense(*qkv, attn_mask=visible), atol=1e-5, rtol=0
    )
    assert (module(*qkv, step=1) - module(*qkv, step=0)).abs().max() > 1e-3


def test_bad_lengths_and_tensors_are_refused(rng):
    module = PSAVideoAttention(config_of("Gilbert"))
    with pytest.raises(ValueError, match="length 500 is not grid .* text"):
        module(*make_qkv(rng, length=500), step=0)
    q, k, v = make_qkv(rng)
    with pytest.raises(TypeError, match="q must be a torch.Tensor"):
        module(q.numpy(), k, v, step=0)
    with pytest.raises(ValueError, match="heads of q must be a multiple"):
        module(q[:, :3], k, v, step=0)
    with pytest.raises(ValueError, match="implementation must be None or one of"):
        module(q, k, v, step=0, implementation="flash")


def test_centroids_pass_from_step_to_step(rng):
    config = config_of("SemanticAware")
    qkv = make_qkv(rng)
    module = PSAVideoAttention(config, warmup_steps=1)
    module(*qkv, step=1)
    order = TokenOrder.from_config(config, LENGTH, LENGTH)
    cold = order.apply(*qkv)[3].centroids
    assert torch.equal(module.centroids.keys, cold.keys) and module.centroids_step == 1
    module(*qkv, step=2)
    warm = order.apply(*qkv, centroids=cold)[3].centroids
    assert torch.equal(module.centroids.keys, warm.keys)
    assert not torch.equal(warm.keys, cold.keys)
    # The same step again starts where the first call of that step did.
    module(*qkv, step=2)
    assert torch.equal(module.centroids.keys, warm.keys)
    # An earlier step is another run.
    module(*qkv, step=1)
    assert torch.equal(module.centroids.keys, cold.keys)
    module(*qkv, step=0)  # so is a warm-up step
    assert module.centroids is None
    module(*qkv, step=1)
    other = make_qkv(rng, heads=2)
    with pytest.raises(ValueError, match="centroids of an earlier call must have shape"):
        module(*other, step=2)
    module.reset()
    module(*other, step=2)


def test_the_second_run_equals_the_first(rng):
    config = config_of("Hybrid")
    steps = [make_qkv(rng) for _ in range(3)]
    module = PSAVideoAttention(config)

    def run():
        return [module(*qkv, step=step) for step, qkv in enumerate(steps)]

    first, second = run(), None
    module.reset()
    second = run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_state_dict_holds_nothing_and_copies_work(rng):
    module = PSAVideoAttention(config_of("SemanticAware"), state=VideoState())
    module(*make_qkv(rng), step=0)
    assert module.centroids is not None and not module.state_dict()
    assert not list(module.parameters()) and not list(module.buffers())
    twin = copy.deepcopy(module)
    assert torch.equal(twin.centroids.keys, module.centroids.keys)
    assert len(twin.state.records) == 1


def test_records_hold_every_layer_step_and_head(rng, tmp_path):
    ratios = {1: (0.0, 0.4), 2: (0.4, 0.6), 4: (0.6, 0.7), 8: (0.7, 0.9), 0: (0.9, 1.0)}
    config = PSAConfig(
        rearrange_method="Gilbert", grid=(4, 8, 24), mask_mode="thresholdbound", mask_ratios=ratios
    )
    state = VideoState()
    layers = [
        PSAVideoAttention(config, warmup_steps=1, layer=f"blocks.{i}", state=state)
        for i in range(2)
    ]
    expected = {}
    for state.step in range(3):
        for layer in layers:
            q, k, v = make_qkv(rng, length=4 * 8 * 24)
            q = q * torch.tensor([1.0, 4, 16, 64])[:, None, None]
            layer(q, k, v)
            levels = psa_attention(q, k, v, config=config, return_levels=True)[1]
            levels = spec_masks.from_segments(levels.numpy())
            for head in range(4):
                density = 1.0 if state.step == 0 else spec_masks.density(levels[:, head])
                expected[layer.layer, state.step, head] = density
    records = state.records.read()
    found = {(r.layer, r.step, r.head): r.density for r in records}
    assert found.keys() == expected.keys() and len(records) == 2 * 3 * 4
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=1e-6)
    assert len({round(value, 6) for value in found.values()}) > 3
    records.to_jsonl(tmp_path / "density.jsonl")
    assert DensityRecords.from_jsonl(tmp_path / "density.jsonl") == records
    state.records.clear()
    assert len(state.records) == 0


def test_records_stay_on_the_device_until_read():
    # A tensor without data: whatever reads a value fails.
    levels = torch.empty(2, 3, 5, 9, dtype=torch.int32, device="meta")
    log = VideoState().records
    density = video._head_density._init_fn(levels, 5 * 128, 9 * 64, PSAConfig().to_json())
    log.append("a", 0, density)
    assert len(log) == 1
    with pytest.raises(NotImplementedError, match="meta"):
        log.read()


def test_head_density_counts_candidates_only(rng):
    config = PSAConfig(causal=True)
    levels = torch.from_numpy(rng.choice([0, 1, 2, 4, 8], (2, 3, 4, 8)).astype(np.int32))
    candidates = candidate_blocks(450, 500, config)
    levels *= torch.arange(8) < torch.from_numpy(candidates)[:, None]
    found = head_density(levels, 450, 500, config)
    for head in range(3):
        expected = spec_masks.density(levels[:, head].numpy(), candidates=candidates)
        assert float(found[head]) == pytest.approx(expected, abs=1e-6)
    torch.library.opcheck(torch.ops.psa.head_density, (levels, 450, 500, config.to_json()))


@pytest.mark.parametrize("method", ["Gilbert", "Clusters", "SemanticAware"])
def test_gradients_are_those_of_psa_attention(rng, method):
    config = config_of(method)
    qkv = [x.requires_grad_() for x in make_qkv(rng)]
    weight = torch.randn(1, 4, LENGTH, 16)
    module = PSAVideoAttention(config, warmup_steps=1)
    for step, expected in ((0, dense(*qkv)), (1, psa_attention(*qkv, config=config))):
        ours = torch.autograd.grad(module(*qkv, step=step), qkv, weight)
        theirs = torch.autograd.grad(expected, qkv, weight)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)
    assert (
        not module.centroids
        or module.centroids.keys is None
        or (not module.centroids.keys.requires_grad)
    )


@pytest.mark.parametrize("method", [None, "Clusters", "SemanticAware"])
def test_compiles_in_one_graph_and_keeps_its_state(rng, method):
    torch._dynamo.reset()
    qkv = make_qkv(rng)
    state = VideoState()
    plain = PSAVideoAttention(config_of(method), warmup_steps=1, layer="a", state=state)
    compiled_state = VideoState()
    module = PSAVideoAttention(config_of(method), warmup_steps=1, layer="a", state=compiled_state)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for step in range(3):
        state.step = compiled_state.step = step
        torch.testing.assert_close(compiled(*qkv), plain(*qkv))
    ours, theirs = compiled_state.records.read(), state.records.read()
    assert ours == theirs and len(ours) == 3 * 4
    if method is not None:
        torch.testing.assert_close(module.centroids.keys, plain.centroids.keys)


@pytest.mark.parametrize("name", presets.names())
def test_presets_run_end_to_end(rng, name):
    preset = presets.load(name)
    divisors = preset.divisors
    if divisors is None:
        size, length = None, 700
    else:
        size = (10 * divisors.width - 3, 8 * divisors.height, 5 * divisors.frames - 1)
        length = 10 * 8 * 5 + preset.config.text_length
    state = VideoState(step=preset.warmup_steps)
    module = PSAVideoAttention.from_preset(name, size, layer=name, state=state)
    assert module.config == PSAConfig.preset(name, size)
    assert module.warmup_steps == preset.warmup_steps
    q, k, v = make_qkv(rng, length=length, heads=2, kv_heads=1)
    q = 3 * q
    out = module(q, k, v)
    expected, _, densities = reference(q, k, v, module.config)
    np.testing.assert_allclose(out.numpy(), expected, atol=2e-5, rtol=0)
    found = [record.density for record in state.records.read()]
    assert found == pytest.approx(densities, abs=1e-6)
    if preset.warmup_steps:
        state.step = preset.warmup_steps - 1
        assert torch.equal(module(q, k, v), dense(q, k, v))
