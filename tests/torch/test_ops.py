"""The operators behind attention inside PyTorch: autograd, compile, export, functorch."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from psa_torch import sparse_attention
from psa_torch.attention.ops import attention_backward, attention_forward
from tests.torch.attention_contract import Case

CASES = [
    Case(q_len=70, kv_len=70, head_dim=8, block_n=32),
    Case(q_len=70, kv_len=99, head_dim=8, heads=4, is_causal=True, level="empty", block_n=32),
]


def attend(case, *tensors, **options):
    return sparse_attention(*tensors, **case.settings(), **options)


def settings(case, implementation="gather", rest="skip"):
    scale = 0.3 if case.scale is None else case.scale
    return implementation, case.block_m, case.block_n, scale, case.is_causal, rest


def leaves(inputs):
    return [x.clone().requires_grad_() for x in inputs[:3]]


@pytest.mark.parametrize("implementation, rest", [(None, "skip"), ("gather", "mean")])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case, implementation, rest, rng):
    inputs = case.inputs(rng)
    arguments = settings(case, implementation, rest)
    torch.library.opcheck(attention_forward, (*leaves(inputs), inputs.levels, *arguments))
    out, lse = attention_forward(*inputs[:4], *arguments)
    for dlse in (inputs.dlse, None):
        given = (inputs.dout, dlse, *inputs[:4], out, lse, *arguments)
        torch.library.opcheck(attention_backward, given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_fakes_match_what_comes_back(dtype, rng):
    case = Case(q_len=70, kv_len=40, heads=4, head_dim=16, dtype=dtype)
    inputs = case.inputs(rng)
    real = attention_forward(*inputs[:4], *settings(case))
    fake = attention_forward(*(x.to("meta") for x in inputs[:4]), *settings(case))
    given = (inputs.dout, None, *inputs[:4], *real, *settings(case))
    real += attention_backward(*given)
    fake += attention_backward(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in given))
    for x, y in zip(real, fake, strict=True):
        assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())


class TestGradients:
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_gradcheck(self, case, rng):
        case = Case(**{**vars(case), "dtype": torch.float64, "batch": 1})
        inputs = case.inputs(rng)

        def both(q, k, v):
            out, lse = attend(case, q, k, v, inputs.levels, return_lse=True)
            return out, lse.masked_fill(lse == -torch.inf, 0)

        assert torch.autograd.gradcheck(both, leaves(inputs), fast_mode=True)

    def test_out_alone_and_lse_alone(self, rng):
        case = CASES[1]
        inputs = case.inputs(rng)
        given = leaves(inputs)
        out, lse = attend(case, *given, inputs.levels, return_lse=True)

        def grad(outputs, weights):
            return torch.autograd.grad(outputs, given, weights, retain_graph=True)

        both = grad((out, lse), (inputs.dout, inputs.dlse))
        parts = zip(grad(out, inputs.dout), grad(lse, inputs.dlse), strict=True)
        for whole, (x, y) in zip(both, parts, strict=True):
            torch.testing.assert_close(x + y, whole, rtol=1e-4, atol=1e-5)

    def test_lse_of_an_empty_row_passes_no_gradient(self, rng):
        case = Case(level=0)
        inputs = case.inputs(rng)
        given = leaves(inputs)
        out, lse = attend(case, *given, inputs.levels, return_lse=True)
        assert (lse == -torch.inf).all()
        for poison in (torch.nan, torch.inf):
            dlse = torch.full_like(lse, poison)
            for grad in torch.autograd.grad(
                (out, lse), given, (inputs.dout, dlse), retain_graph=True
            ):
                assert (grad == 0).all()

    def test_only_some_inputs_require_gradients(self, rng):
        case = CASES[0]
        inputs = case.inputs(rng)
        full = leaves(inputs)
        want = torch.autograd.grad(attend(case, *full, inputs.levels), full, inputs.dout)
        for i in range(3):
            given = [x.requires_grad_(i == j) for j, x in enumerate(leaves(inputs))]
            attend(case, *given, inputs.levels).backward(inputs.dout)
            assert torch.equal(given[i].grad, want[i])
            assert all(x.grad is None for j, x in enumerate(given) if j != i)

    def test_second_derivatives_are_refused(self, rng):
        case = CASES[0]
        inputs = case.inputs(rng)
        given = leaves(inputs)
        out = attend(case, *given, inputs.levels)
        (dq,) = torch.autograd.grad(out.square().sum(), given[0], create_graph=True)
        with pytest.raises(NotImplementedError, match="no second derivatives"):
            dq.sum().backward()


def _loss(case):
    def loss(q, k, v, levels):
        out, lse = attend(case, torch.tanh(q), k, v, levels, return_lse=True)
        seen = lse.masked_fill(lse == -torch.inf, 0)
        return out.square().sum() + (out.mean((2, 3)) * seen.mean(2)).sum()

    return loss


class TestCompile:
    @pytest.fixture(autouse=True)
    def fresh(self):
        torch._dynamo.reset()

    @pytest.mark.parametrize(
        ("backend", "dynamic"), [("aot_eager", False), ("aot_eager", True), ("inductor", True)]
    )
    def test_no_graph_break_and_equal_gradients(self, backend, dynamic, rng):
        counter = CompileCounterWithBackend(backend)
        base = CASES[1]
        compiled = torch.compile(_loss(base), fullgraph=True, dynamic=dynamic, backend=counter)
        for q_len, kv_len in ((150, 161), (200, 300), (330, 420))[: 3 if dynamic else 1]:
            case = Case(**{**vars(base), "q_len": q_len, "kv_len": kv_len})
            inputs = case.inputs(rng)
            given = leaves(inputs)
            got, want = (f(*given, inputs.levels) for f in (compiled, _loss(case)))
            torch.testing.assert_close(got, want)
            grads = (torch.autograd.grad(x, given) for x in (got, want))
            for x, y in zip(*grads, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
        assert counter.frame_count == 1, "recompiled for another length"

    def test_under_autocast(self, rng):
        case = CASES[0]
        inputs = case.inputs(rng)
        compiled = torch.compile(lambda *x: attend(case, *x), fullgraph=True, backend="aot_eager")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got, want = compiled(*inputs[:4]), attend(case, *inputs[:4])
        assert got.dtype == torch.bfloat16 and torch.equal(got, want)

    def test_segments(self, rng):
        from psa_torch.masks import to_segments

        case = CASES[0]
        inputs = case.inputs(rng)
        compiled = torch.compile(lambda *x: attend(case, *x), fullgraph=True, backend="aot_eager")
        got = compiled(*inputs[:3], to_segments(inputs.levels))
        assert torch.equal(got, attend(case, *inputs[:4]))

    def test_bad_levels_are_still_refused(self, rng):
        case = CASES[0]
        inputs = case.inputs(rng)
        compiled = torch.compile(lambda *x: attend(case, *x), fullgraph=True, backend="aot_eager")
        with pytest.raises(ValueError, match="levels must be 0, 1, 2, 4 or 8, got 3"):
            compiled(*inputs[:3], torch.full_like(inputs.levels, 3))


def test_export_with_a_dynamic_length(rng):
    class Model(torch.nn.Module):
        def forward(self, q, k, v, levels):
            return sparse_attention(q, k, v, levels, block_m=64, block_n=32)

    small, large = (Case(q_len=n, kv_len=n, block_n=32) for n in (192, 448))
    inputs = small.inputs(rng)
    units = torch.export.Dim("units", min=2, max=64)
    axes = {2: 64 * units}
    shapes = (axes, axes, axes, {2: units, 3: 2 * units})
    program = torch.export.export(Model(), inputs[:4], dynamic_shapes=shapes)
    assert "psa.attention_forward" in str(program.graph)
    for case in (small, large):
        inputs = case.inputs(rng)
        assert torch.equal(program.module()(*inputs[:4]), Model()(*inputs[:4]))


class TestFunctorch:
    def each(self, case):
        return lambda *x: attend(case, *(t[None] for t in x))[0]

    def loss(self, case):
        each = self.each(case)
        return lambda *x: each(*x).square().sum()

    def reference(self, case, inputs):
        given = leaves(inputs)
        attend(case, *given, inputs.levels).square().sum().backward()
        return [x.grad for x in given]

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_vmap(self, case, rng):
        inputs = case.inputs(rng)
        want = attend(case, *inputs[:4])
        assert torch.equal(torch.vmap(self.each(case))(*inputs[:4]), want)
        moved = torch.vmap(self.each(case), in_dims=(3, 0, 0, 0), out_dims=1)
        assert torch.equal(moved(inputs.q.movedim(0, 3), *inputs[1:4]).transpose(0, 1), want)

    def test_vmap_over_shared_keys(self, rng):
        case = CASES[0]
        inputs = case.inputs(rng)
        k, v = inputs.k[0], inputs.v[0]
        got = torch.vmap(self.each(case), in_dims=(0, None, None, 0))(inputs.q, k, v, inputs.levels)
        keys = (x.expand(2, *x.shape) for x in (k, v))
        assert torch.equal(got, attend(case, inputs.q, *keys, inputs.levels))

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_grad_and_per_sample_grad(self, case, rng):
        inputs = case.inputs(rng)
        want = self.reference(case, inputs)
        arguments = (0, 1, 2)

        def whole(*x):
            return attend(case, *x).square().sum()

        for got in (
            torch.func.grad(whole, arguments)(*inputs[:4]),
            torch.vmap(torch.func.grad(self.loss(case), arguments))(*inputs[:4]),
            torch.func.grad(lambda *x: torch.vmap(self.loss(case))(*x).sum(), arguments)(
                *inputs[:4]
            ),
        ):
            for x, y in zip(got, want, strict=True):
                torch.testing.assert_close(x, y)

    def test_hessians_are_refused(self, rng):
        case = CASES[0]
        inputs = case.inputs(rng)
        hessian = torch.func.jacrev(torch.func.grad(lambda *x: attend(case, *x).square().sum()))
        with pytest.raises(NotImplementedError, match="no second derivatives"):
            hessian(*inputs[:4])
