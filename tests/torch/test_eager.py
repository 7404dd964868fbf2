"""Operators are called where somebody looks for them, and only there."""

import contextlib

import pytest
import torch
from torch._library.custom_ops import CustomOpDef
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from psa_torch import psa_attention, sparse_attention
from psa_torch._eager import is_eager, wants_gradient
from psa_torch.choice import choose_levels
from shared_specs import PSAConfig

CONFIG = PSAConfig(block_m=64, block_n=32)


@pytest.fixture
def called(monkeypatch):
    """Names of the operators that were called."""
    names = []
    plain = CustomOpDef.__call__

    def call(self, *args, **kwargs):
        names.append(self._qualname)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(CustomOpDef, "__call__", call)
    return names


def draw(dtype=torch.float32, requires_grad=False):
    return [torch.randn(1, 2, 150, 16, dtype=dtype, requires_grad=requires_grad) for _ in range(3)]


def attend(q, k, v):
    return psa_attention(q, k, v, config=CONFIG)


def test_an_eager_call_needs_no_operator(called):
    q, k, v = draw(requires_grad=True)
    out = attend(q, k, v)
    levels = choose_levels(q, k, CONFIG).levels
    given = sparse_attention(q, k, v, levels, block_m=64, block_n=32)
    assert torch.equal(out, given)
    torch.autograd.grad(out.sum() + given.sum(), (q, k, v))
    with torch.no_grad():
        assert not attend(q, k, v).requires_grad
    with torch.inference_mode():
        assert attend(q, k, v).is_inference()
    assert not [name for name in called if "attention" in name or "levels" in name]
    assert "psa::block_scores" not in called


def test_gradients_are_those_of_the_operator():
    inputs = draw(requires_grad=True)
    levels = choose_levels(*inputs[:2], CONFIG).levels
    arguments = (levels, None, 64, 32, 0.25, False, "skip")
    weights = torch.randn(1, 2, 150, 16), torch.randn(1, 2, 150)
    eager = sparse_attention(*inputs, levels, block_m=64, block_n=32, scale=0.25, return_lse=True)
    operator = torch.ops.psa.attention_forward(*inputs, *arguments)
    for chosen in ((0,), (1,), (0, 1)):
        found, want = (
            torch.autograd.grad(
                [outputs[i] for i in chosen],
                inputs,
                [weights[i] for i in chosen],
                retain_graph=True,
            )
            for outputs in (eager, operator)
        )
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_modes_see_operators(called):
    q, k, v = draw()
    with FlopCounterMode(display=False) as counter:
        attend(q, k, v)
    assert counter.get_total_flops() > 0 and "psa::attention_forward" in called
    called.clear()
    with FakeTensorMode() as mode:
        assert attend(*map(mode.from_tensor, (q, k, v))).shape == q.shape
    assert {"psa::block_scores", "psa::select_levels", "psa::attention_forward"} <= {*called}


def test_tracers_see_operators(called):
    graph = make_fx(attend)(*draw())
    targets = {str(node.target) for node in graph.graph.nodes}
    assert "psa.attention_forward.default" in targets
    exported = torch.export.export(_Attend(), tuple(draw()))
    assert "psa.chosen_attention.default" in str(exported.graph)


class _Attend(torch.nn.Module):
    def forward(self, q, k, v):
        return attend(q, k, v)


def test_subclasses_see_operators(called):
    class Other(torch.Tensor):
        pass

    q, k, v = draw()
    want = attend(q, k, v)
    assert not called
    out = attend(*(x.as_subclass(Other) for x in (q, k, v)))
    assert "psa::attention_forward" in called
    assert torch.equal(out.as_subclass(torch.Tensor), want)


def test_parameters_are_tensors(called):
    q, k, v = (torch.nn.Parameter(x) for x in draw())
    attend(q, k, v).sum().backward()
    assert q.grad is not None and not called


@pytest.mark.parametrize(
    "context",
    [
        lambda: FlopCounterMode(display=False),
        FakeTensorMode,
        forward_ad.dual_level,
    ],
)
def test_is_eager(context):
    x = torch.zeros(3)
    assert is_eager(x, None, 3) and is_eager(torch.nn.Parameter(x))
    with context():
        assert not is_eager(x)
    assert is_eager(x)
    seen = []
    torch.func.vmap(lambda y: seen.append(is_eager(y)) or y)(x[None])
    torch.func.grad(lambda y: seen.append(is_eager(y)) or y.sum())(x)
    assert seen == [False, False]


@pytest.mark.parametrize("enabled", [True, False])
def test_wants_gradient(enabled):
    x, y = torch.zeros(3, requires_grad=True), torch.zeros(3)
    with contextlib.nullcontext() if enabled else torch.no_grad():
        assert wants_gradient(y, x) == enabled
        assert not wants_gradient(y)


def test_checks_of_kept_sizes_still_refuse():
    q, k, v = draw()
    for _ in range(3):
        attend(q, k, v)
        with pytest.raises(ValueError, match="v must have the shape of k"):
            attend(q, k, v[:, :, :-1])
        with pytest.raises(TypeError, match="one dtype"):
            attend(q, k, v.double())
        with pytest.raises(ValueError, match="levels must be"):
            psa_attention(q, k, v, config=CONFIG, levels=torch.zeros(1, 2, 3, 4, dtype=torch.int32))
