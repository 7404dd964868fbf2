"""PSAVideoAttention called twice a step, recomputed, compiled and transformed."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from psa_torch import PSAVideoAttention, VideoState
from shared_specs import PSAConfig

GRID = (4, 8, 8)


def config_of(method):
    return PSAConfig(rearrange_method=method, grid=GRID)


def normal(rng, *shape):
    return torch.from_numpy(rng.normal(size=shape))


def make_qkv(rng, heads=2):
    return [normal(rng, 1, heads, 256, 16) for _ in range(3)]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("method", "refresh_every"),
    [("Gilbert", 1), ("Clusters", 1), ("SemanticAware", 1), ("Gilbert", 2), ("Clusters", 2)],
)
def test_a_checkpoint_changes_neither_gradients_nor_records(
    rng, method, refresh_every, reentrant, compiled
):
    steps = [make_qkv(rng) for _ in range(4)]

    def run(wrap):
        layer = PSAVideoAttention(
            config_of(method), warmup_steps=1, refresh_every=refresh_every, state=VideoState()
        )
        call = torch.compile(layer, backend="aot_eager") if compiled else layer
        grads = []
        for step, qkv in enumerate(steps):
            layer.state.step = step
            qkv = [x.clone().requires_grad_() for x in qkv]
            wrap(call, *qkv).square().sum().backward()
            grads += [x.grad for x in qkv]
        return grads, layer.state.records.read(), layer.centroids

    torch._dynamo.reset()
    wanted, records, centroids = run(lambda f, *qkv: f(*qkv))
    found, found_records, found_centroids = run(
        lambda f, *qkv: checkpoint(f, *qkv, use_reentrant=reentrant)
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert found_records == records and len(records) == 4 * 2
    if centroids is not None:
        assert torch.equal(found_centroids.keys, centroids.keys)


@pytest.mark.parametrize(("method", "refresh_every"), [("Hybrid", 1), ("Gilbert", 2)])
def test_a_recomputation_after_another_step_is_refused(rng, method, refresh_every):
    layer = PSAVideoAttention(config_of(method), refresh_every=refresh_every)
    q, k, v = make_qkv(rng)
    q.requires_grad_()
    out = checkpoint(lambda x: layer(x, k, v, step=0), q, use_reentrant=False)
    layer(q.detach(), k, v, step=1)
    with pytest.raises(RuntimeError, match="recomputed at step 0 .* those of step 1"):
        out.sum().backward()


@pytest.mark.parametrize("refresh_every", [1, 2])
@pytest.mark.parametrize("by_state", [False, True])
def test_branches_of_guidance_do_not_meet(rng, by_state, refresh_every):
    steps = [(make_qkv(rng), make_qkv(rng)) for _ in range(3)]

    def run(branches):
        state = VideoState() if by_state else None
        layer, outputs = (
            PSAVideoAttention(config_of("SemanticAware"), refresh_every=refresh_every, state=state),
            {},
        )
        for step, inputs in enumerate(steps):
            for branch in branches:
                if by_state:
                    state.step, state.branch = step, branch
                    out = layer(*inputs[branch == "negative"])
                else:
                    out = layer(*inputs[branch == "negative"], step=step, branch=branch)
                outputs[step, branch] = out
        return outputs

    together = run(["positive", "negative"])
    for other in (run(["negative", "positive"]), run(["positive"]), run(["negative"])):
        assert all(torch.equal(together[key], out) for key, out in other.items())


def test_a_branch_that_is_no_string_is_refused(rng):
    with pytest.raises(TypeError, match="branch must be a string, got 1"):
        PSAVideoAttention()(*make_qkv(rng), step=0, branch=1)
    with pytest.raises(TypeError, match="branch must be a string, got None"):
        VideoState().branch = None


class Block(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.to_qkv, self.attention = nn.Linear(32, 96), attention

    def forward(self, x):
        q, k, v = self.to_qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind()
        return x + self.attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("repeated_blocks", [False, True])
@pytest.mark.parametrize(
    ("method", "refresh_every"), [(None, 1), ("Gilbert", 4), ("Clusters", 1), ("Clusters", 4)]
)
def test_twelve_layers_and_twelve_steps_are_two_graphs(rng, method, refresh_every, repeated_blocks):
    torch.manual_seed(int(rng.integers(2**31)))
    state = VideoState()
    model = nn.Sequential(
        *(
            Block(
                PSAVideoAttention(
                    config_of(method),
                    warmup_steps=3,
                    refresh_every=refresh_every,
                    layer=f"blocks.{i}",
                    state=state,
                )
            )
            for i in range(12)
        )
    )
    inputs = [normal(rng, 1, 256, 32).float() for _ in range(12)]

    def run():
        state.records.clear()
        for block in model:
            block.attention.reset()
        outputs = []
        with torch.no_grad():
            for state.step in range(12):
                outputs.append(model(inputs[state.step]))
        return outputs, state.records.read()

    wanted, records = run()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    for module in model if repeated_blocks else [model]:
        module.compile(backend=counter, fullgraph=True)
    found, found_records = run()
    assert counter.frame_count == 2
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert found_records == records and len(records) == 12 * 12 * 2
    assert {record.layer for record in records} == {f"blocks.{i}" for i in range(12)}


def test_steps_given_with_the_call_are_few_graphs(rng):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    layer = PSAVideoAttention(config_of("Hybrid"), warmup_steps=3)
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    qkv = make_qkv(rng)
    for step in range(12):
        compiled(*qkv, step=step)
    assert counter.frame_count <= 4
    assert layer.centroids_step == 11


def test_vmap_leaves_plain_tensors_in_the_layer(rng):
    layer = PSAVideoAttention(config_of("SemanticAware"), layer="a", state=VideoState())
    q, k, v = (normal(rng, 3, 1, 2, 256, 16) for _ in range(3))
    found = torch.vmap(layer)(q, k, v)
    records = layer.state.records.read()
    assert layer.centroids.keys.shape[:2] == (3, 2)
    wanted = layer.state.records
    wanted.clear()
    layer.reset()
    torch.testing.assert_close(found[:, 0], layer(q[:, 0], k[:, 0], v[:, 0]))
    assert [r.density for r in records] == pytest.approx([r.density for r in wanted.read()])


@pytest.mark.parametrize("step", [0, 1])
def test_forward_mode_of_dense_and_sparse_steps(rng, step):
    q, k, v = make_qkv(rng)
    layer = PSAVideoAttention(config_of("Hybrid"), warmup_steps=1)
    out, moved = torch.func.jvp(lambda v: layer(q, k, v, step=step), (v,), (2 * v,))
    torch.testing.assert_close(moved, 2 * out)  # linear in v
