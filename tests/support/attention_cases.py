"""What the attention contracts of both frameworks share: problems, the oracle's answer, errors."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from shared_specs import attention as oracle
from shared_specs.constants import LEVELS, MASK_LEVELS
from shared_specs.geometry import cdiv
from shared_specs.pyramid import build_pyramid, pooled_counts

FLOAT32_TOLERANCE = 2e-6


class Inputs(NamedTuple):
    """Arrays of whichever framework; `levels` int32 `[B, H, Nq, Nk]`."""

    q: Any
    k: Any
    v: Any
    levels: Any
    dout: Any
    dlse: Any


class Results(NamedTuple):
    """Float64, whatever they were computed in."""

    out: np.ndarray
    lse: np.ndarray
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem; `level` is a level for every block, or 'mixed', or 'empty' (mixed, with query
    blocks that have no key block at all). Its `dtype` is the framework's."""

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
    dtype: Any = "float32"

    def __str__(self) -> str:
        default = type(self)()
        changed = {f: v for f, v in vars(self).items() if v != getattr(default, f)}
        return ",".join(f"{f}={v}".replace("torch.", "") for f, v in changed.items()) or "default"

    def settings(self) -> dict:
        names = ("block_m", "block_n", "scale", "is_causal")
        return {name: getattr(self, name) for name in names}

    def draw(self, rng: np.random.Generator) -> Inputs:
        """Normal float64 inputs and levels, in NumPy."""
        q_shape = (self.batch, self.heads, self.q_len, self.head_dim)
        k_shape = (self.batch, self.kv_heads, self.kv_len, self.head_dim)
        width = self.value_dim or self.head_dim
        shapes = (q_shape, k_shape, (*k_shape[:3], width), (*q_shape[:3], width), q_shape[:3])
        q, k, v, dout, dlse = (rng.standard_normal(shape) for shape in shapes)
        return Inputs(q, k, v, self.draw_levels(rng), dout, dlse)

    def draw_levels(self, rng: np.random.Generator) -> np.ndarray:
        n_q, n_k = cdiv(self.q_len, self.block_m), cdiv(self.kv_len, self.block_n)
        levels = rng.choice(MASK_LEVELS, size=(self.batch, self.heads, n_q, n_k))
        if isinstance(self.level, int):
            levels[:] = self.level
        elif self.level == "empty":
            levels[:, 0, ::2] = 0
            levels[-1, -1] = 0
        return levels.astype(np.int32)


def expected(inputs: Inputs, **settings) -> Results:
    """The oracle's answer to NumPy inputs, in float64."""
    q, k, v, levels, dout, dlse = inputs
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


class WholePyramid(NamedTuple):
    """Sparse attention as dense attention over every pyramid row.

    Attributes:
        pool: `[P, Lk]`, keys to pyramid rows.
        bias: `[B, H, Lq, P]`, log of the keys a row stands for; -inf where levels do not list it.
    """

    pool: np.ndarray
    bias: np.ndarray


def whole_pyramid(
    levels: np.ndarray, q_len: int, kv_len: int, block_m: int, block_n: int
) -> WholePyramid:
    """What dense attention of a framework's own needs to be the yardstick of its dtype."""
    eye = np.eye(kv_len)[None, None]
    pool = build_pyramid(eye, eye, block_n).k[0, 0]
    n_k = levels.shape[-1]
    of_block = np.concatenate([np.repeat(np.arange(n_k), block_n // level) for level in LEVELS])
    of_level = np.repeat(LEVELS, [n_k * block_n // level for level in LEVELS])
    with np.errstate(divide="ignore"):
        counts = np.log(pooled_counts(kv_len, block_n))
    bias = np.where(levels[..., of_block] == of_level, counts, -np.inf)
    return WholePyramid(pool, bias.repeat(block_m, -2)[:, :, :q_len])
