"""What every JAX implementation of attention must satisfy: subclass `AttentionContract`.

Everything is compared with the float64 oracle of `shared_specs.attention`.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from psa_jax import sparse_attention
from shared_specs.masks import to_segments
from tests.support import attention_cases
from tests.support.attention_cases import (
    FLOAT32_TOLERANCE,
    Inputs,
    Results,
    assert_close,
    relative_errors,
    whole_pyramid,
)

QUICK = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
"""Compiling is most of the time of these tests."""


@dataclasses.dataclass(frozen=True)
class Case(attention_cases.Case):
    """One problem, with jax arrays for inputs."""

    def inputs(self, rng: np.random.Generator) -> Inputs:
        q, k, v, levels, dout, dlse = self.draw(rng)
        q, k, v, dout, dlse = (jnp.asarray(x, self.dtype) for x in (q, k, v, dout, dlse))
        levels, dlse = jnp.asarray(levels), dlse.astype(lse_dtype(self.dtype))
        return Inputs(q, k, v, levels, dout, dlse)

    def levels(self, rng: np.random.Generator) -> Array:
        return jnp.asarray(self.draw_levels(rng))


def lse_dtype(dtype) -> str:
    return "float64" if dtype == "float64" else "float32"


def to_numpy(x: Array) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def run(inputs: Inputs, implementation: str | None, **settings) -> Results:
    """Forward and backward through the public function, in one program."""

    @functools.partial(jax.jit, compiler_options=QUICK)
    def both(q, k, v, levels, dout, dlse):
        def attend(q, k, v):
            return sparse_attention(
                q, k, v, levels, implementation=implementation, return_lse=True, **settings
            )

        results, pull = jax.vjp(attend, q, k, v)
        return *results, *pull((dout, dlse))

    results = both(*inputs)
    wanted = (inputs.dout, None, *inputs[:3])
    for x, like in zip(results, wanted, strict=True):
        if like is not None:
            assert x.shape == like.shape and x.dtype == like.dtype
    lse = results[1]
    assert lse.shape == inputs.q.shape[:3] and lse.dtype == lse_dtype(inputs.q.dtype)
    return Results(*map(to_numpy, results))


def expected(inputs: Inputs, **settings) -> Results:
    """The oracle's answer to the same inputs, in float64."""
    exact = Inputs(*map(to_numpy, inputs))._replace(levels=np.asarray(inputs.levels))
    return attention_cases.expected(exact, **settings)


def plain_attention(inputs: Inputs, *, block_m, block_n, scale, is_causal) -> Results:
    """Dense attention in the dtype of the inputs over the whole pyramid, masked: the yardstick of
    what that dtype can be asked for."""
    assert not is_causal and scale is None
    dtype, lengths = inputs.q.dtype, (inputs.q.shape[2], inputs.k.shape[2])
    whole = whole_pyramid(np.asarray(inputs.levels), *lengths, block_m, block_n)
    pool, bias = whole.pool.astype(np.float32), jnp.asarray(whole.bias, dtype)

    @jax.jit
    def both(q, k, v, dout, dlse):
        def attend(q, k, v):
            k, v = (jnp.einsum("pn,bhnd->bhpd", pool, x).astype(dtype) for x in (k, v))
            logits = jnp.einsum("bhmd,bhpd->bhmp", q, k) * q.shape[-1] ** -0.5 + bias
            lse = jax.nn.logsumexp(logits.astype(jnp.float32), -1)
            return jnp.einsum("bhmp,bhpd->bhmd", jax.nn.softmax(logits, -1), v), lse

        results, pull = jax.vjp(attend, q, k, v)
        return *results, *pull((dout, dlse))

    return Results(*map(to_numpy, both(*inputs[:3], *inputs[4:])))


SHAPES = [
    Case(block_m=64, block_n=64, q_len=256, kv_len=256),
    Case(block_m=64, block_n=32, q_len=200, kv_len=333),
    Case(block_m=128, block_n=64, q_len=200, kv_len=333),
    Case(block_m=128, block_n=128, q_len=300, kv_len=700),
]
LENGTHS = [
    Case(q_len=1, kv_len=1),
    Case(q_len=65, kv_len=3),
    Case(q_len=130, kv_len=63),
    Case(q_len=1, kv_len=1030),
]
ALONE = [
    Case(level=level, kv_len=length) for level, length in ((0, 192), (1, 193), (4, 201), (8, 201))
]
CAUSAL = [
    Case(is_causal=True, block_n=32, q_len=77, kv_len=300),
    Case(is_causal=True, block_n=128, q_len=300, kv_len=77),
    Case(is_causal=True, level="empty", q_len=200, kv_len=201),
]
OTHERS = [
    Case(level="empty"),
    Case(heads=4, kv_heads=2),
    Case(heads=3, kv_heads=1, is_causal=True),
    Case(scale=-1.5, is_causal=True),
    Case(head_dim=8, scale=0.37),
    Case(head_dim=256),
]
ALL = SHAPES + LENGTHS + ALONE + CAUSAL + OTHERS


class AttentionContract:
    """Tests of one implementation; a subclass names it and the float32 tolerance if wider."""

    implementation: str
    tolerance = FLOAT32_TOLERANCE

    @pytest.mark.parametrize("case", ALL, ids=str)
    def test_forward_and_backward(self, case, rng):
        inputs = case.inputs(rng)
        got = run(inputs, self.implementation, **case.settings())
        assert_close(got, expected(inputs, **case.settings()), self.tolerance)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_low_precision_is_as_good_as_plain_attention(self, dtype, rng):
        case = Case(dtype=dtype, q_len=256, kv_len=512, head_dim=64)
        inputs = case.inputs(rng)
        want = expected(inputs, **case.settings())
        ours = relative_errors(run(inputs, self.implementation, **case.settings()), want)
        plain = relative_errors(plain_attention(inputs, **case.settings()), want)
        assert all(ours[name] <= 2 * plain[name] for name in ours), (ours, plain)

    def test_logits_far_from_zero(self, rng):
        case = Case(scale=300.0)
        inputs = case.inputs(rng)
        got = run(inputs, self.implementation, **case.settings())
        assert_close(got, expected(inputs, **case.settings()), 1e-3)

    def test_segments_are_the_same_mask(self, rng):
        case = Case()
        inputs = case.inputs(rng)
        segments = jnp.asarray(to_segments(np.asarray(inputs.levels)))
        settings = {**case.settings(), "implementation": self.implementation}
        attend = jax.jit(functools.partial(sparse_attention, **settings))
        of_dense, of_segments = (attend(*inputs[:3], x) for x in (inputs.levels, segments))
        np.testing.assert_allclose(of_segments, of_dense, rtol=0, atol=1e-6)

    def test_without_lse_the_gradient_is_that_of_out_alone(self, rng):
        case = Case(level="empty", is_causal=True)
        inputs = case.inputs(rng)

        def attend(q, k, v):
            return sparse_attention(
                q, k, v, inputs.levels, implementation=self.implementation, **case.settings()
            )

        grads = jax.jit(lambda *qkv: jax.vjp(attend, *qkv)[1](inputs.dout))(*inputs[:3])
        want = expected(inputs._replace(dlse=jnp.zeros_like(inputs.dlse)), **case.settings())
        chex.assert_trees_all_close(grads, want[2:], rtol=0, atol=5e-6)
