"""Derivatives that `torch.func` and dual tensors ask for: right, or refused by name."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap

from psa_torch import psa_attention, sparse_attention
from psa_torch.attention import ops
from psa_torch.order import TokenOrder
from psa_torch.pyramid import build_pyramid
from shared_specs import PSAConfig
from tests.torch.attention_contract import Case

METHODS = [None, "Gilbert", "STA", "Clusters", "SemanticAware", "Hybrid"]


def normal(rng, *shape):
    return torch.from_numpy(rng.normal(size=shape))


def pair(products):
    return sum((a * b).sum() for a, b in products)


def assert_dual(f, inputs, tangents, rng):
    """Forward mode is the transpose of reverse mode, which is tested against the oracle."""
    outputs, moved = jvp(f, inputs, tangents)
    weights = [normal(rng, *x.shape).to(x.dtype) for x in outputs]
    given = [x.clone().requires_grad_() for x in inputs]
    grads = torch.autograd.grad(f(*given), given, weights)
    expected = pair(zip(grads, tangents, strict=True))
    assert expected.abs() > 1e-3
    torch.testing.assert_close(pair(zip(moved, weights, strict=True)), expected)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)]
        for x, y in zip(f(*duals), moved, strict=True):
            torch.testing.assert_close(forward_ad.unpack_dual(x).tangent, y)


@pytest.mark.parametrize("is_causal", [False, True])
def test_tangents_at_given_levels(rng, is_causal):
    case = Case(
        q_len=200, kv_len=150, head_dim=8, value_dim=16, heads=4, is_causal=is_causal,
        level="empty", block_n=32, dtype=torch.float64,
    )  # fmt: skip
    inputs = case.inputs(rng)
    tangents = tuple(normal(rng, *x.shape) for x in inputs[:3])

    def f(q, k, v):
        out, lse = sparse_attention(q, k, v, inputs.levels, return_lse=True, **case.settings())
        return out, lse.masked_fill(lse == -torch.inf, 0)

    assert_dual(f, tuple(inputs[:3]), tangents, rng)
    step = 1e-6
    ahead, behind = (
        f(*(x + s * t for x, t in zip(inputs[:3], tangents, strict=True))) for s in (step, -step)
    )
    for a, b, moved in zip(ahead, behind, jvp(f, tuple(inputs[:3]), tangents)[1], strict=True):
        torch.testing.assert_close((a - b) / (2 * step), moved, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_tangents_of_chosen_levels(rng, method):
    qkv, tangents = (tuple(normal(rng, 1, 2, 256, 8) for _ in range(3)) for _ in range(2))
    config = PSAConfig(rearrange_method=method, grid=(4, 8, 8))
    assert_dual(lambda *x: psa_attention(*x, config=config, return_lse=True), qkv, tangents, rng)


@pytest.mark.parametrize("method", METHODS[1:])
def test_tangents_of_token_orders(rng, method):
    qkv, tangents = (tuple(normal(rng, 1, 2, 256, 8) for _ in range(3)) for _ in range(2))
    config = PSAConfig(rearrange_method=method, grid=(4, 8, 8))
    order = TokenOrder.from_config(config, 256, 256)

    def f(q, k, v):
        q, k, v, state = order.apply(q, k, v)
        return order.undo(q * 2, state), k, v

    assert_dual(f, qkv, tangents, rng)


def test_tangents_of_the_pyramid(rng):
    kv, tangents = (tuple(normal(rng, 1, 2, 77, 8) for _ in range(2)) for _ in range(2))
    assert_dual(lambda k, v: build_pyramid(k, v, 32), kv, tangents, rng)
    mapped = vmap(lambda k, v: build_pyramid(k, v, 32))(*(x[None] for x in kv))
    for x, y in zip(mapped, build_pyramid(*kv, 32), strict=True):
        assert torch.equal(x[0], y)


@pytest.mark.parametrize("method", METHODS)
def test_reverse_transforms(rng, method):
    q, k, v = (normal(rng, 1, 2, 128, 8) for _ in range(3))
    config = PSAConfig(rearrange_method=method, grid=(2, 8, 8))

    def loss(q):
        return psa_attention(q, k, v, config=config).square().sum()

    x = q.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(loss(x), x)
    one = torch.ones((), dtype=torch.float64)
    derivatives = (
        grad(loss)(q),
        vjp(loss, q)[1](one)[0],
        jacrev(loss)(q),
        vmap(grad(loss))(q[None])[0],
    )
    for found in derivatives:
        torch.testing.assert_close(found, wanted)


def test_jacfwd_is_jacrev(rng):
    q, k, v = (normal(rng, 1, 1, 130, 8) for _ in range(3))
    weight = normal(rng, 3)
    config = PSAConfig(rearrange_method="Gilbert", grid=(2, 5, 13))

    def f(scale):
        out = psa_attention(q * scale.sum(), k, v * scale[0], config=config)
        return out.mean(-1)

    torch.testing.assert_close(jacfwd(f)(weight), jacrev(f)(weight))


SECOND_DERIVATIVES = [
    lambda f: grad(lambda x: grad(f)(x).sum()),
    lambda f: jacfwd(grad(f)),
    lambda f: grad(lambda x: jvp(f, (x,), (x,))[1]),
]


@pytest.mark.parametrize("transform", SECOND_DERIVATIVES)
def test_second_derivatives_are_refused_by_name(rng, transform):
    q, k, v = (normal(rng, 1, 1, 64, 8) for _ in range(3))
    with pytest.raises(NotImplementedError, match="psa_torch attention has no second derivatives"):
        transform(lambda x: psa_attention(x, k, v).square().sum())(q)


def test_an_implementation_without_forward_mode_is_refused_by_name(rng, monkeypatch):
    class Reverse:
        unsupported = staticmethod(lambda *_: None)
        forward = staticmethod(ops.IMPLEMENTATIONS["gather"].forward)

    monkeypatch.setitem(ops.IMPLEMENTATIONS, "triton", Reverse)
    q, k, v = (normal(rng, 1, 1, 64, 8) for _ in range(3))
    with pytest.raises(NotImplementedError, match="'triton' has no forward-mode .*'gather' has"):
        jvp(lambda x: psa_attention(x, k, v, implementation="triton"), (q,), (q,))


@pytest.mark.parametrize("method", [None, "Gilbert", "Clusters"])
def test_transforms_inside_compile(rng, method):
    qkv, tangents = (tuple(normal(rng, 1, 2, 128, 8) for _ in range(3)) for _ in range(2))
    config = PSAConfig(rearrange_method=method, grid=(2, 8, 8))

    def f(*x):
        return psa_attention(*x, config=config)

    def forward(*x):
        return jvp(f, x, tangents)[1]

    def reverse(q, k, v):
        return grad(lambda x: f(x, k, v).square().sum())(q)

    for g in (forward, reverse):
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(g, backend="aot_eager")(*qkv), g(*qkv))


def test_one_graph_with_a_transform_inside_is_refused_by_name(rng):
    torch._dynamo.reset()
    q, k, v = (normal(rng, 1, 1, 64, 8) for _ in range(3))
    compiled = torch.compile(
        lambda x: jvp(lambda x: psa_attention(x, k, v), (x,), (x,)), fullgraph=True, backend="eager"
    )
    with pytest.raises(torch._dynamo.exc.Unsupported, match="psa_torch attention inside a torch"):
        compiled(q)


def test_rooms_inside_compile(rng):
    k, t = normal(rng, 1, 2, 128, 8), normal(rng, 1, 2, 128, 8)
    order = TokenOrder.from_config(PSAConfig(rearrange_method="Gilbert", grid=(2, 8, 8)), 128, 128)
    for f in (lambda x: build_pyramid(x, x, 32).k, lambda x: order.apply(x, x, x)[0]):
        torch._dynamo.reset()
        found = torch.compile(lambda x, f=f: jvp(f, (x,), (t,))[1], backend="aot_eager")(k)
        torch.testing.assert_close(found, f(t))
