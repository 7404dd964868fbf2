"""Derivatives that JAX's transformations ask for: right, or refused by name."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax import psa_attention, sparse_attention
from psa_jax._arrays import announce
from psa_jax.attention import implementations
from psa_jax.order import TokenOrder
from psa_jax.pyramid import build_pyramid
from psa_jax.video import PSAVideoAttention
from shared_specs import PSAConfig
from tests.jax.attention_contract import QUICK, Case

METHODS = ["Gilbert", "STA", "SemanticAware", "Hybrid"]
BLOCKS = {"block_m": 64, "block_n": 32}
quick = functools.partial(jax.jit, compiler_options=QUICK)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape))


def pair(a, b):
    return sum((x * y).sum() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def assert_dual(f, inputs, rng):
    """Forward mode is the transpose of reverse mode, which is tested against the oracle."""
    tangents = tuple(normal(rng, *x.shape) for x in inputs)
    outputs, moved = quick(functools.partial(jax.jvp, f))(inputs, tangents)
    weights = jax.tree.map(lambda x: normal(rng, *x.shape), outputs)
    grads = quick(lambda *inputs: jax.vjp(f, *inputs)[1](weights))(*inputs)
    expected = pair(grads, tangents)
    assert abs(expected) > 1e-3
    np.testing.assert_allclose(pair(moved, weights), expected, rtol=1e-10)
    return outputs, tangents, moved


@pytest.mark.parametrize("rest", ["skip", "mean"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_tangents_at_given_levels(rng, is_causal, rest):
    case = Case(
        q_len=100, kv_len=90, head_dim=8, heads=4, kv_heads=2, is_causal=is_causal, level="empty",
        block_n=32, batch=1, dtype="float64", value_dim=16 if rest == "mean" else None,
    )  # fmt: skip
    inputs = case.inputs(rng)

    def f(q, k, v):
        settings = {"return_lse": True, "rest": rest, **case.settings()}
        out, lse = sparse_attention(q, k, v, inputs.levels, **settings)
        return out, jnp.where(lse == -jnp.inf, 0, lse)

    _, tangents, moved = assert_dual(f, inputs[:3], rng)
    step, run = 1e-6, quick(f)
    ahead, behind = (
        run(*(x + s * t for x, t in zip(inputs[:3], tangents, strict=True))) for s in (step, -step)
    )
    for a, b, x in zip(ahead, behind, moved, strict=True):
        np.testing.assert_allclose((a - b) / (2 * step), x, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", [None, "Hybrid"])
def test_tangents_of_chosen_levels(rng, method):
    config = PSAConfig(rearrange_method=method, grid=(2, 8, 8), **BLOCKS)
    inputs = tuple(normal(rng, 1, 2, 128, 8) for _ in range(3))
    assert_dual(lambda *x: psa_attention(*x, config=config, return_lse=True), inputs, rng)


@pytest.mark.parametrize("method", METHODS)
def test_tangents_of_token_orders(rng, method):
    config = PSAConfig(rearrange_method=method, grid=(2, 8, 8))
    order = TokenOrder.from_config(config, 128, 128)

    def f(q, k, v):
        q, k, v, state = order.apply(q, k, v)
        return order.undo(q * 2, state), k, v

    assert_dual(f, tuple(normal(rng, 1, 2, 128, 8) for _ in range(3)), rng)


def test_tangents_of_the_pyramid(rng):
    kv = tuple(normal(rng, 1, 2, 77, 8) for _ in range(2))
    assert_dual(lambda k, v: tuple(build_pyramid(k, v, 32)), kv, rng)


@pytest.mark.parametrize("step", [0, 1])
def test_forward_mode_of_dense_and_sparse_steps(rng, step):
    q, k, v = (normal(rng, 1, 1, 128, 8) for _ in range(3))
    module = PSAVideoAttention(
        PSAConfig(rearrange_method="Hybrid", grid=(2, 8, 8), **BLOCKS), warmup_steps=1
    )

    def f(v):
        return module.apply({}, q, k, v, step=step, mutable=["psa"])[0]

    out, moved = quick(lambda v: jax.jvp(f, (v,), (2 * v,)))(v)
    np.testing.assert_allclose(moved, 2 * out, rtol=1e-10)  # linear in v


def given_levels(rng):
    levels = jnp.asarray(rng.choice([1, 2, 4, 8], size=(1, 1, 1, 2)), jnp.int32)
    k, v = (normal(rng, 1, 1, 64, 8) for _ in range(2))
    return lambda q: sparse_attention(q, k, v, levels, **BLOCKS)


def test_jacobians_linearize_and_linear_transpose(rng):
    attend, q = given_levels(rng), normal(rng, 1, 1, 64, 8)
    weight = normal(rng, *q.shape)

    def f(a):  # three numbers in, three out
        return (attend(q * a[0] + a[1] * weight) * jnp.arange(3.0)[:, None, None, None, None]).mean(
            (1, 2, 3, 4)
        ) + a[2]

    a = normal(rng, 3)
    forward, reverse = (quick(jacobian(f))(a) for jacobian in (jax.jacfwd, jax.jacrev))
    np.testing.assert_allclose(forward, reverse, rtol=1e-9, atol=1e-12)
    tangent = normal(rng, *q.shape)
    out, push = jax.linearize(attend, q)
    moved = jax.jvp(attend, (q,), (tangent,))[1]
    np.testing.assert_allclose(push(tangent), moved, rtol=1e-10)
    (pulled,) = jax.linear_transpose(push, q)(weight)
    (wanted,) = jax.vjp(attend, q)[1](weight)
    np.testing.assert_allclose(pulled, wanted, rtol=1e-10)
    # Both are linear in what they are given, and have derivatives as such (Gauss-Newton products).
    pull = jax.vjp(attend, q)[1]
    (again,) = jax.jvp(lambda x: pull(x)[0], (weight,), (out,))[1:]
    np.testing.assert_allclose(again, pull(out)[0], rtol=1e-10)


def test_vmap_of_both_modes(rng):
    attend = given_levels(rng)
    q, t = normal(rng, 3, 1, 1, 64, 8), normal(rng, 3, 1, 1, 64, 8)

    def both(q, t):
        return jax.jvp(attend, (q,), (t,))[1], jax.vjp(attend, q)[1](t)[0]

    one = quick(both)
    for axis in (0, 3):
        moved = (jnp.moveaxis(x, 0, axis) for x in (q, t))
        mapped = quick(jax.vmap(both, in_axes=axis))(*moved)
        for i in range(3):
            for x, y in zip(mapped, one(q[i], t[i]), strict=True):
                np.testing.assert_allclose(x[i], y, rtol=1e-9, atol=1e-12)


SECOND_DERIVATIVES = [
    jax.hessian,
    lambda f: jax.grad(lambda x: jax.grad(f)(x).sum()),
    lambda f: jax.grad(lambda x: jax.jvp(f, (x,), (x,))[1]),
    lambda f: lambda x: jax.jvp(lambda x: jax.jvp(f, (x,), (x,))[1], (x,), (x,)),
    lambda f: jax.hessian(jax.jit(jax.checkpoint(f))),
]


@pytest.mark.parametrize("transform", SECOND_DERIVATIVES)
def test_second_derivatives_are_refused_by_name(rng, transform):
    attend = given_levels(rng)
    with pytest.raises(NotImplementedError, match="psa_jax attention has no second derivatives"):
        transform(lambda x: (attend(x) ** 2).sum())(normal(rng, 1, 1, 64, 8))


def test_forward_mode_of_mosaic_says_what_computes_it(rng, monkeypatch, caplog):
    q, levels = normal(rng, 1, 1, 64, 8), jnp.ones((1, 1, 1, 2), jnp.int32)

    class Kernels(type(implementations.IMPLEMENTATIONS["mosaic"])):
        unsupported = staticmethod(lambda *_: None)
        forward = staticmethod(implementations.gather.forward)

    def moved(name):
        return quick(
            lambda q: jax.jvp(
                lambda q: sparse_attention(q, q, q, levels, implementation=name, **BLOCKS),
                (q,), (q,),
            )[1]
        )(q)  # fmt: skip

    monkeypatch.setitem(implementations.IMPLEMENTATIONS, "mosaic", Kernels())
    announce.forget()
    with caplog.at_level(logging.WARNING, logger="psa_jax"):
        np.testing.assert_array_equal(moved("mosaic"), moved("gather"))
        moved("mosaic")
    (record,) = caplog.records
    assert "forward-mode derivatives of 'mosaic' are computed by 'gather'" in record.message
