"""PSAAttention inside models: compilation, export, autocast, checkpointing, transforms."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from psa_torch import PSAAttention, PSAConfig, psa_attention

WIDTH, HEADS = 64, 4


class Block(nn.Module):
    def __init__(self, config, width=WIDTH, heads=HEADS):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width)
        self.attend = PSAAttention(config)
        self.merge = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x):
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        out = self.attend(*(y.transpose(1, 2) for y in (q, k, v)))
        x = x + self.merge(out.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Transformer(nn.Module):
    def __init__(self, config, depth):
        super().__init__()
        self.blocks = nn.ModuleList(Block(config) for _ in range(depth))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def model_of(config=None, depth=2):
    torch.manual_seed(0)
    return Transformer(config, depth)


def tokens(length, seed=1):
    return torch.randn(1, length, WIDTH, generator=torch.Generator().manual_seed(seed))


def loss_and_gradients(model, x, reference=None):
    """Loss of `model`, and the gradients of the parameters of `reference` (the model itself)."""
    loss = model(x).square().mean()
    return loss.detach(), torch.autograd.grad(loss, list((reference or model).parameters()))


def assert_equal_gradients(got, want):
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-6)


class TestCompile:
    @pytest.fixture(autouse=True)
    def fresh(self):
        torch._dynamo.reset()

    @pytest.mark.parametrize(
        ("backend", "dynamic", "depth"),
        [
            ("aot_eager", False, 2),
            ("aot_eager", True, 1),
            pytest.param("inductor", True, 1, marks=pytest.mark.slow),
        ],
    )
    def test_a_transformer_forward_and_backward(self, backend, dynamic, depth):
        model, counter = model_of(depth=depth), CompileCounterWithBackend(backend)
        compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=counter)
        frames = 0
        for length in (300, 190, 513)[: 3 if dynamic else 1]:
            x = tokens(length)
            got = loss_and_gradients(compiled, x, model)
            assert_equal_gradients(got, loss_and_gradients(model, x))
            frames = frames or counter.frame_count
            assert counter.frame_count == frames > 0, "recompiled for another length"

    OVERRIDDEN = {
        "causal": lambda *x: psa_attention(*x, causal=True, scale=0.2, mask_mode="thresholdbound"),
        "ratios": lambda *x: psa_attention(*x, mask_ratios={1: (0, 0.3), 8: (0.3, 0.9)}),
        "old form": lambda *x: psa_attention(
            *x, attn_impl="old_mask_type", block_n=128, use_sim_mask=True, return_levels=True
        ),
        "antidiagonal": lambda *x: psa_attention(
            *x, importance="antidiagonal", return_lse=True, return_levels=True
        ),
    }

    @pytest.mark.parametrize("case", OVERRIDDEN)
    @pytest.mark.parametrize("dynamic", [False, True])
    def test_overrides(self, case, dynamic):
        self.compare(self.OVERRIDDEN[case], dynamic, lengths=(300, 450))

    @pytest.mark.parametrize("method", ["Gilbert", "Clusters", "SemanticAware"])
    def test_token_orders(self, method):
        config = PSAConfig(rearrange_method=method, grid=(3, 10, 10), scale=0.3)
        for dynamic in (False, True):
            self.compare(lambda *x: psa_attention(*x, config=config), dynamic, lengths=(300,))

    def compare(self, function, dynamic, lengths):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=counter)
        for length in lengths:
            q, k, v = torch.randn(3, 1, 2, length, 32)
            got, want = compiled(q, k, v), function(q, k, v)
            got, want = (x if isinstance(x, tuple) else (x,) for x in (got, want))
            assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
        assert counter.frame_count == (1 if dynamic else len(lengths))

    def test_levels_of_the_caller(self):
        q, k, v = torch.randn(3, 1, 2, 300, 32)
        _, levels = psa_attention(q, k, v, return_levels=True)
        module = PSAAttention()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(q, k, v, levels=levels), module(q, k, v, levels=levels))

    def test_another_configuration_is_noticed(self):
        q, k, v = torch.randn(3, 1, 2, 300, 32)
        module = PSAAttention()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        first = compiled(q, k, v)
        module.config = PSAConfig(causal=True)
        second = compiled(q, k, v)
        assert torch.equal(second, psa_attention(q, k, v, causal=True))
        assert not torch.equal(first, second)

    def test_under_autocast(self):
        model, x = model_of(), tokens(300)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(compiled(x), model(x))

    def test_bad_input_is_still_refused(self):
        compiled = torch.compile(PSAAttention(), fullgraph=True, backend="aot_eager")
        q = torch.randn(1, 2, 100, 20)
        with pytest.raises(Exception, match="head dimension must be a multiple of 8"):
            compiled(q, q, q)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    model = model_of(PSAConfig(causal=True)).eval()
    shapes = ({1: torch.export.Dim("length", min=2, max=4096)},)
    program = torch.export.export(model, (tokens(300),), dynamic_shapes=shapes, strict=strict)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "psa.chosen_attention.default" in names
    for length in (300, 177, 600, 129, 128, 65, 64, 2):
        torch.testing.assert_close(program.module()(tokens(length)), model(tokens(length)))


class Layer(torch.nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.settings = settings

    def forward(self, q, k, v):
        return psa_attention(q, k, v, return_lse=True, **self.settings)


def exported(layer, rng):
    shapes = {x: {2: torch.export.Dim("length", min=2, max=1000)} for x in "qkv"}
    return torch.export.export(layer, heads_of(300, rng), dynamic_shapes=shapes)


def heads_of(length, rng):
    return tuple(torch.from_numpy(rng.normal(size=(1, 2, length, 16))).float() for _ in range(3))


def test_gradients_of_an_exported_program(rng):
    layer = Layer(causal=True, importance="sampled")
    program = exported(layer, rng).module()
    for length in (40, 300):
        leaves = [x.requires_grad_() for x in heads_of(length, rng)]
        for use in ((0,), (1,), (0, 1)):
            grads = [
                torch.autograd.grad(
                    sum(f(*leaves)[i].square().sum() for i in use), leaves, allow_unused=True
                )
                for f in (program, layer)
            ]
            for x, y in zip(*grads, strict=True):
                assert (x is None and y is None) or torch.equal(x, y)


@pytest.mark.slow
def test_ahead_of_time_compilation_with_a_dynamic_length(rng, tmp_path):
    layer = Layer()
    package = torch._inductor.aoti_compile_and_package(
        exported(layer, rng), package_path=str(tmp_path / "layer.pt2")
    )
    loaded = torch._inductor.aoti_load_package(package)
    for length in (2, 64, 129, 300, 999):
        x = heads_of(length, rng)
        for got, want in zip(loaded(*x), layer(*x), strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("importance", ["pooled", "sampled"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(importance, use_reentrant):
    """The recomputation chooses the same levels, sampled estimate included."""
    model = model_of(PSAConfig(importance=importance))

    def checkpointed(x):
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=use_reentrant)
        return x

    x = tokens(300).requires_grad_()
    got, want = (f(x).square().mean() for f in (checkpointed, model))
    got.backward()
    first = [x.grad.clone(), *(p.grad.clone() for p in model.parameters())]
    x.grad = None
    model.zero_grad()
    want.backward()
    assert torch.equal(got, want)
    for a, b in zip(first, [x.grad, *(p.grad for p in model.parameters())], strict=True):
        assert torch.equal(a, b)


class TestAutocast:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_like_scaled_dot_product_attention(self, dtype):
        q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 2, 200, 32))
        with torch.autocast("cpu", dtype=dtype):
            out, levels = psa_attention(q, k, v, return_levels=True)
            mixed = psa_attention(q.to(dtype), k, v)
            theirs = nn.functional.scaled_dot_product_attention(q, k, v)
        by_hand = psa_attention(*(x.to(dtype) for x in (q, k, v)), return_levels=True)
        assert out.dtype == mixed.dtype == theirs.dtype == dtype
        assert torch.equal(out, by_hand[0]) and torch.equal(levels, by_hand[1])
        assert torch.equal(mixed, out)
        grads = torch.autograd.grad(out.float().sum(), (q, k, v))
        assert all(x.dtype == torch.float32 and torch.isfinite(x).all() for x in grads)

    def test_float64_and_disabled_autocast_change_nothing(self):
        q, k, v = torch.randn(3, 1, 2, 200, 32)
        want = psa_attention(q, k, v)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert psa_attention(q.double(), k.double(), v.double()).dtype == torch.float64
            with torch.autocast("cpu", enabled=False):
                assert torch.equal(psa_attention(q, k, v), want)


class TestNoGradientThroughScores:
    def inputs(self):
        torch.manual_seed(3)
        return [x.requires_grad_() for x in torch.randn(3, 1, 2, 300, 32)]

    @pytest.mark.parametrize(
        "overrides",
        [
            {},
            {"importance": "sampled", "mask_mode": "thresholdbound"},
            {"importance": "antidiagonal"},
            {"attn_impl": "old_mask_type", "block_n": 128, "use_sim_mask": True},
        ],
    )
    def test_gradients_are_those_of_the_levels_given(self, overrides):
        q, k, v = self.inputs()
        out, levels = psa_attention(q, k, v, return_levels=True, **overrides)
        given = psa_attention(q, k, v, levels=levels, **overrides)
        assert not levels.requires_grad
        chosen_grads, given_grads = (
            torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, given)
        )
        assert all(torch.equal(x, y) for x, y in zip(chosen_grads, given_grads, strict=True))


class TestTransforms:
    def test_vmap(self):
        q, k, v = torch.randn(3, 4, 1, 2, 200, 32)
        got = torch.vmap(lambda *x: psa_attention(*x, return_lse=True))(q, k, v)
        each = [psa_attention(*x, return_lse=True) for x in zip(q, k, v, strict=True)]
        for x, y in zip(got, zip(*each, strict=True), strict=True):
            torch.testing.assert_close(x, torch.stack(y))

    def test_vmap_of_segments_and_similarity(self):
        q, k, v = torch.randn(3, 2, 1, 2, 260, 32)
        old = {"attn_impl": "old_mask_type", "block_n": 128, "use_sim_mask": True}
        for overrides in ({}, old):
            got = torch.vmap(lambda *x, o=overrides: psa_attention(*x, return_levels=True, **o)[1])(
                q, k, v
            )
            for i in range(2):
                want = psa_attention(q[i], k[i], v[i], return_levels=True, **overrides)[1]
                assert torch.equal(got[i], want)

    def test_per_sample_gradients(self):
        q, k, v = torch.randn(3, 3, 1, 2, 130, 32)

        def loss(*x):
            return psa_attention(*x).square().sum()

        got = torch.vmap(torch.func.grad(loss))(q, k, v)
        for i in range(3):
            x = q[i].clone().requires_grad_()
            loss(x, k[i], v[i]).backward()
            torch.testing.assert_close(got[i], x.grad)
