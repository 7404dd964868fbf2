"""How much each key block matters to each query block (specification, section 5).

Scores carry no gradient: levels are chosen, not learnt. Logits are made for a few query blocks at
a time, all heads together, so that nothing of size Lq x Lk exists and sharded heads stay apart.
"""

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from psa_jax._arrays import announce, platform_of
from psa_jax._mosaic.device import interpreter
from psa_jax._sharding import per_shard
from psa_jax._switches import numpy_rules
from psa_jax.defect import defect_scores
from psa_jax.pyramid import accumulator, group_means, split_tokens
from shared_specs.config import PSAConfig
from shared_specs.geometry import cdiv
from shared_specs.sampling import SamplePlan

CHUNK_ELEMENTS = {"cpu": 1 << 22, "gpu": 1 << 26}
"""Logits held at one time, unless one query block of all heads alone has more: what stays in a
CPU's cache; on a GPU, what makes the launches of a chunk short beside its work."""


@numpy_rules
def block_scores(q: Array, k: Array, config: PSAConfig) -> Array:
    """Scores of every (query block, key block) pair by `config.importance`.

    Args:
        q: `[B, H, Lq, D]`.
        k: `[B, Hk, Lk, D]`, `H % Hk == 0`.
        config: block sizes, estimator and its parameters, `causal`, `scale`.

    Returns:
        float32 `[B, H, Nq, Nk]`, at least 0, comparable inside a row only; 0 where no sampled
        key is visible. For 'defect' `[B, H, Nq, Nk, 4]`: what the block loses at level 2, 4, 8
        and at rest. No gradient flows from it to q and k.

    `pooled` and `sampled` scores of 16-bit inputs are made by a kernel on a Hopper GPU, all
    others by XLA; which, and why, is logged once through the logger `psa_jax`, as a warning where
    a GPU could have made them by a kernel.
    """
    q, k = lax.stop_gradient(q), lax.stop_gradient(k)
    against = _against_kernel(q, k, config)
    where = platform_of(q)
    if against and where == "gpu" and config.importance in ("pooled", "sampled"):
        message = "scores are made by %s: the kernel %s; logits then pass through memory"
        announce(message, "XLA", against, level=logging.WARNING)
    else:
        by, why = ("XLA", against) if against else ("a kernel", f"q is on {where}")
        announce("scores are made by %s: %s", by, why)
    if against is None:
        from psa_jax.kernels.scores import peak_scores

        run = functools.partial(peak_scores, config=config, interpret=interpreter())
        return per_shard(run, q, k)
    if config.importance == "defect":
        return defect_scores(
            q,
            k,
            block_m=config.block_m,
            block_n=config.block_n,
            sample_m=config.resolved_sample_m,
            scale=config.resolved_scale(q.shape[-1]),
            causal=config.causal,
            rest_mean=config.is_rest_mean,
        )
    estimators = {
        "pooled": pooled_scores,
        "sampled": sampled_scores,
        "antidiagonal": antidiagonal_scores,
    }
    return estimators[config.importance](q, k, config)


def _against_kernel(q: Array, k: Array, config: PSAConfig) -> str | None:
    """Why the kernel does not make these scores, or None if it does."""
    if interpreter() is None and platform_of(q) != "gpu":
        return f"q is on {platform_of(q)}, not gpu"
    from psa_jax.kernels import scores  # brings Pallas along

    return scores.unsupported(q, k, config)


@numpy_rules
def pooled_scores(q: Array, k: Array, config: PSAConfig) -> Array:
    """Rows and columns are means over groups of `importance_pool` adjacent tokens.

    Under a causal mask a group of keys is visible when its first key is at or before the last
    query of the group.
    """
    size = config.importance_pool

    def side(x: Array, block: int) -> _Side:
        spans = _spans(x.shape[2], block, size)
        return _Side(group_means(x, size, len(spans[0])), *spans)

    return _scores(side(q, config.block_m), side(k, config.block_n), q, k, config, _largest_ratio)


@numpy_rules
def sampled_scores(q: Array, k: Array, config: PSAConfig) -> Array:
    """Rows and columns are tokens at fixed offsets of each block.

    Offsets past the end of the sequence are clamped to its last token. Under a causal mask a key
    is visible when it is at or before the query.
    """

    def side(x: Array, plan: SamplePlan) -> _Side:
        starts = np.arange(cdiv(x.shape[2], plan.block)) * plan.block
        at = np.minimum((starts[:, None] + plan.offsets).ravel(), x.shape[2] - 1)
        return _Side(x[:, :, at].astype(accumulator(x.dtype)), at, at)

    rows, cols = side(q, config.query_samples), side(k, config.key_samples)
    return _scores(rows, cols, q, k, config, _largest_ratio)


@numpy_rules
def antidiagonal_scores(q: Array, k: Array, config: PSAConfig) -> Array:
    """Softmax over tiles of the q.k sums along each tile's antidiagonal, summed over a block.

    A tile pairs `g = antidiagonal_stride` queries with `g` keys: query `i` meets key `g - 1 - i`.
    Tokens past the end of the sequence add nothing. Under a causal mask a tile is visible when
    its first key is at or before its last query.
    """
    size = config.antidiagonal_stride

    def side(x: Array, block: int, step: int) -> _Side:
        spans = _spans(x.shape[2], block, size)
        tiles = split_tokens(x.astype(accumulator(x.dtype)), len(spans[0]), size)[..., ::step, :]
        return _Side(tiles.reshape(*tiles.shape[:3], -1), *spans)

    rows, cols = side(q, config.block_m, 1), side(k, config.block_n, -1)
    return _scores(rows, cols, q, k, config, _summed_softmax)


class _Side(NamedTuple):
    """Rows or columns of the logits, whole blocks of them.

    Attributes:
        tokens: `[B, H, N, D]`.
        first, last: int `[N]`, first and last token position that each stands for; a position
            past the end of the sequence marks padding.
    """

    tokens: Array
    first: np.ndarray
    last: np.ndarray


def _spans(length: int, block: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    first = np.arange(cdiv(length, block) * (block // size)) * size
    return first, np.where(first < length, np.minimum(first + size, length) - 1, first)


def _scores(
    rows: _Side, cols: _Side, q: Array, k: Array, config: PSAConfig, reduce: Callable
) -> Array:
    """Block scores from rows and columns, a few query blocks at a time."""
    (b, h, q_len, d), (_, h_kv, kv_len, _) = q.shape, k.shape
    scale = config.resolved_scale(d)
    n_q, n_k, group = cdiv(q_len, config.block_m), cdiv(kv_len, config.block_n), h // h_kv
    m, n, width = rows.tokens.shape[2] // n_q, cols.tokens.shape[2] // n_k, rows.tokens.shape[3]
    most = CHUNK_ELEMENTS["gpu" if platform_of(q) == "gpu" else "cpu"]
    chunk = min(n_q, max(1, most // (b * h * m * n * n_k)))
    chunks = cdiv(n_q, chunk)
    query = rows.tokens.reshape(b, h_kv, group, n_q, m, width) * scale
    query = jnp.pad(query, [(0, 0)] * 3 + [(0, chunks * chunk - n_q), (0, 0), (0, 0)])
    query = jnp.moveaxis(query.reshape(b, h_kv, group, chunks, chunk, m, width), 3, 0)
    # Columns of one place in their block lie together, so that reductions over a block run
    # along an outer axis.
    key = jnp.swapaxes(cols.tokens.reshape(b, h_kv, n_k, n, width), 2, 3)
    col_first = cols.first.reshape(n_k, n).T
    row_last = np.pad(rows.last.reshape(n_q, m), ((0, chunks * chunk - n_q), (0, 0)))
    row_last = jnp.asarray(row_last.reshape(chunks, chunk, m), jnp.int32)
    real = jnp.asarray(col_first < kv_len)
    # Coarse inputs do not profit from more than the device's fast float32 product.
    exact = jnp.dtype(q.dtype).itemsize >= 4
    precision = lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT

    def one_chunk(chunk_of_rows):
        left, last = chunk_of_rows
        logits = jnp.einsum("bhgcmd,bhnkd->bhgcmnk", left, key, precision=precision)
        visible = real
        if config.causal:
            visible &= jnp.asarray(col_first, jnp.int32) <= last[..., None, None] + kv_len - q_len
        logits = jnp.where(visible, logits, -jnp.inf)
        return reduce(logits, (last < q_len)[..., None]).astype(jnp.float32)

    scores = jnp.moveaxis(lax.map(one_chunk, (query, row_last)), 0, 3)
    return scores.reshape(b, h, chunks * chunk, n_k)[:, :, :n_q]


def _largest_ratio(logits: Array, real: Array) -> Array:
    """exp(logit - row maximum), its largest value per block: `[..., m, n, Nk]` to `[..., Nk]`."""
    block = logits.max(-2)
    ratio = jnp.exp(block - _finite(block.max(-1, keepdims=True)))
    return jnp.where(real, ratio, 0).max(-2)


def _summed_softmax(logits: Array, real: Array) -> Array:
    """Softmax over a row's columns, summed per block: `[..., m, n, Nk]` to `[..., Nk]`."""
    weights = jnp.exp(logits - _finite(logits.max((-2, -1), keepdims=True))).sum(-2)
    total = weights.sum(-1, keepdims=True)
    return jnp.where(real, weights / jnp.where(total > 0, total, 1), 0).sum(-2)


def _finite(top: Array) -> Array:
    """A row that sees nothing has maximum -inf; any finite number makes its ratios 0, not NaN."""
    return jnp.where(top == -jnp.inf, 0, top)
