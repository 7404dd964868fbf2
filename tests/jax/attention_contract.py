"""What every JAX implementation of attention must satisfy: subclass `AttentionContract`.

Everything is compared with the float64 oracle of `shared_specs.attention`.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from psa_jax import sparse_attention
from shared_specs import attention as oracle
from shared_specs.constants import LEVELS, MASK_LEVELS
from shared_specs.masks import to_segments
from shared_specs.pyramid import build_pyramid, pooled_counts

FLOAT32_TOLERANCE = 2e-6

QUICK = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
"""Compiling is most of the time of these tests."""


class Inputs(NamedTuple):
    q: Array
    k: Array
    v: Array
    levels: Array
    dout: Array
    dlse: Array


class Results(NamedTuple):
    out: np.ndarray
    lse: np.ndarray
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem; `level` is a level for every block, or 'mixed', or 'empty' (mixed, with query
    blocks that have no key block at all)."""

    q_len: int = 200
    kv_len: int = 200
    head_dim: int = 32
    value_dim: int | None = None  # None: head_dim
    batch: int = 2
    heads: int = 2
    kv_heads: int = 2
    block_m: int = 64
    block_n: int = 64
    level: int | str = "mixed"
    is_causal: bool = False
    scale: float | None = None
    dtype: str = "float32"

    def __str__(self):
        default = Case()
        changed = {f: v for f, v in vars(self).items() if v != getattr(default, f)}
        return ",".join(f"{f}={v}" for f, v in changed.items()) or "default"

    def settings(self) -> dict:
        names = ("block_m", "block_n", "scale", "is_causal")
        return {name: getattr(self, name) for name in names}

    def inputs(self, rng: np.random.Generator) -> Inputs:
        q_shape = (self.batch, self.heads, self.q_len, self.head_dim)
        k_shape = (self.batch, self.kv_heads, self.kv_len, self.head_dim)
        width = self.value_dim or self.head_dim
        v_shape, out_shape = (*k_shape[:3], width), (*q_shape[:3], width)

        def normal(shape):
            return jnp.asarray(rng.standard_normal(shape), self.dtype)

        q, k, v, dout = (normal(shape) for shape in (q_shape, k_shape, v_shape, out_shape))
        dlse = normal(q_shape[:3]).astype(lse_dtype(self.dtype))
        return Inputs(q, k, v, self.levels(rng), dout, dlse)

    def levels(self, rng: np.random.Generator) -> Array:
        n_q, n_k = -(-self.q_len // self.block_m), -(-self.kv_len // self.block_n)
        levels = rng.choice(MASK_LEVELS, size=(self.batch, self.heads, n_q, n_k))
        if isinstance(self.level, int):
            levels[:] = self.level
        elif self.level == "empty":
            levels[:, 0, ::2] = 0
            levels[-1, -1] = 0
        return jnp.asarray(levels.astype(np.int32))


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
    q, k, v, dout, dlse = map(to_numpy, (*inputs[:3], *inputs[4:]))
    levels = np.asarray(inputs.levels)
    out, lse = oracle.sparse_attention(q, k, v, levels, return_lse=True, **settings)
    grads = oracle.sparse_attention_grad(q, k, v, levels, dout, dlse=dlse, **settings)
    return Results(out, lse, *grads)


def relative_errors(got: Results, want: Results) -> dict[str, float]:
    """Norm of the difference over the norm of the answer; rows with lse -inf must agree exactly."""
    blind = np.isneginf(want.lse)
    np.testing.assert_array_equal(np.isneginf(got.lse), blind)
    assert (got.out[blind] == 0).all() and (got.dq[blind] == 0).all()
    errors = {}
    for name, x, y in zip(Results._fields, got, want, strict=True):
        if name == "lse":
            x, y = x[~blind], y[~blind]
        assert np.isfinite(x).all(), f"{name} is not finite"
        # An answer that is all zeros (only empty rows) has to be met exactly.
        errors[name] = float(np.linalg.norm(x - y) / (np.linalg.norm(y) or 1e-30))
    return errors


def assert_close(got: Results, want: Results, tolerance: float) -> None:
    errors = relative_errors(got, want)
    assert max(errors.values()) <= tolerance, errors


def plain_attention(inputs: Inputs, *, block_m, block_n, scale, is_causal) -> Results:
    """Dense attention in the dtype of the inputs over the whole pyramid, masked: the yardstick of
    what that dtype can be asked for."""
    assert not is_causal and scale is None
    levels, dtype, kv_len = np.asarray(inputs.levels), inputs.q.dtype, inputs.k.shape[2]
    counts = pooled_counts(kv_len, block_n)
    eye = np.eye(kv_len)[None, None]
    pool = build_pyramid(eye, eye, block_n).k[0, 0].astype(np.float32)
    n_k = levels.shape[-1]
    of_block = np.concatenate([np.repeat(np.arange(n_k), block_n // level) for level in LEVELS])
    of_level = np.repeat(LEVELS, [n_k * block_n // level for level in LEVELS])
    with np.errstate(divide="ignore"):
        bias = np.where(levels[..., of_block] == of_level, np.log(counts), -np.inf)
    bias = jnp.asarray(bias.repeat(block_m, -2)[:, :, : inputs.q.shape[2]], dtype)

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
        for got, exact in zip(grads, want[2:], strict=True):
            np.testing.assert_allclose(got, exact, rtol=0, atol=5e-6)
