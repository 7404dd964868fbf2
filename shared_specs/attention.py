"""The float64 oracle: attention over a pyramid at given levels (specification, section 4)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from shared_specs.checks import check_rest
from shared_specs.config import resolve_scale
from shared_specs.constants import LEVELS
from shared_specs.geometry import cdiv, level_start, padded_length, pyramid_rows
from shared_specs.masks import check_levels, from_segments
from shared_specs.pyramid import Pyramid, block_counts, build_pyramid, group_means, pooled_counts


def sparse_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    levels: np.ndarray,
    *,
    block_m: int,
    block_n: int,
    scale: float | None = None,
    is_causal: bool = False,
    rest: str = "skip",
    q_lens: np.ndarray | None = None,
    kv_lens: np.ndarray | None = None,
    return_lse: bool = False,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Attention of every query over the pooled tokens that its block's levels select.

    Args:
        q: `[B, H, Lq, D]`, any float dtype.
        k, v: `[B, Hk, Lk, D]` and `[B, Hk, Lk, Dv]`, `H % Hk == 0`.
        levels: `[B, H, Nq, Nk]`, or segments `[B, H, Nq, Nk + 5]`.
        block_m, block_n: queries and keys per block.
        scale: factor on q.k; None means `D ** -0.5`.
        is_causal: a pooled token is visible iff its last covered key is at or before
            `row + Lk - Lq`.
        rest: 'skip', or 'mean': a block of level 0 is one token, the mean of all its keys.
        q_lens, kv_lens: tokens of each sequence, integers `[B]`; None means all. What lies past
            is not there: each sequence is computed alone.
        return_lse: also return the natural log of the sum of exponentials.

    Returns:
        out `[B, H, Lq, Dv]` and, if asked, lse `[B, H, Lq]`, float64 (long double for long double
        inputs). A row that sees nothing has out 0 and lse -inf.
    """
    q, k, v = (_wide(x) for x in (q, k, v))
    out = np.zeros((*q.shape[:3], v.shape[3]), q.dtype)
    lse = np.full(q.shape[:3], -np.inf, q.dtype)
    settings = {
        "block_m": block_m,
        "block_n": block_n,
        "scale": scale,
        "is_causal": is_causal,
        "rest": rest,
    }
    if q_lens is not None or kv_lens is not None:
        for at in _sequences(q, k, levels, q_lens, kv_lens, block_m, block_n):
            arrays = q[at.queries], k[at.keys], v[at.keys], at.levels
            out[at.queries], lse[at.queries] = sparse_attention(
                *arrays, **settings, return_lse=True
            )
        return (out, lse) if return_lse else out
    for at in _visits(q, k, v, levels, **settings):
        out[at.head][at.rows] = at.weights @ at.values
        lse[at.head][at.rows] = at.lse
    return (out, lse) if return_lse else out


def sparse_attention_grad(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    levels: np.ndarray,
    dout: np.ndarray,
    *,
    block_m: int,
    block_n: int,
    scale: float | None = None,
    is_causal: bool = False,
    rest: str = "skip",
    q_lens: np.ndarray | None = None,
    kv_lens: np.ndarray | None = None,
    dlse: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of `sum(out * dout) + sum(lse * dlse)` with the levels held fixed.

    Args:
        dout: `[B, H, Lq, Dv]`.
        rest, q_lens, kv_lens: as in `sparse_attention`; past a length gradients are 0.
        dlse: `[B, H, Lq]` or None for 0; ignored on rows that see nothing.

    Returns:
        dq `[B, H, Lq, D]`, dk `[B, Hk, Lk, D]` and dv `[B, Hk, Lk, Dv]`, float64.
    """
    q, k, v, dout = (_wide(x) for x in (q, k, v, dout))
    settings = {
        "block_m": block_m,
        "block_n": block_n,
        "scale": scale,
        "is_causal": is_causal,
        "rest": rest,
    }
    if q_lens is not None or kv_lens is not None:
        dq, dk, dv = (np.zeros_like(x) for x in (q, k, v))
        for at in _sequences(q, k, levels, q_lens, kv_lens, block_m, block_n):
            dq[at.queries], dk[at.keys], dv[at.keys] = sparse_attention_grad(
                q[at.queries],
                k[at.keys],
                v[at.keys],
                at.levels,
                dout[at.queries],
                dlse=None if dlse is None else dlse[at.queries],
                **settings,
            )
        return dq, dk, dv
    factor = resolve_scale(scale, q.shape[-1])
    dq = np.zeros_like(q)
    dk_rows, dv_rows = (np.zeros_like(x) for x in _rows(k, v, block_n))
    for at in _visits(q, k, v, levels, **settings):
        grad = dout[at.head][at.rows]
        d_weights = grad @ at.values.T
        d_logits = at.weights * (d_weights - (at.weights * d_weights).sum(-1, keepdims=True))
        if dlse is not None:
            d_logits += at.weights * _wide(dlse)[at.head][at.rows][:, None]
        dq[at.head][at.rows] = factor * d_logits @ at.keys
        dk_rows[at.kv_head][at.tokens] += factor * d_logits.T @ q[at.head][at.rows]
        dv_rows[at.kv_head][at.tokens] += at.weights.T @ grad
    return dq, _unpool(dk_rows, k.shape[2], block_n), _unpool(dv_rows, k.shape[2], block_n)


class _Sequence(NamedTuple):
    """Where one sequence of a batch is: indices of `[B, H, L, ...]` arrays, and its levels."""

    queries: tuple[slice, ...]
    keys: tuple[slice, ...]
    levels: np.ndarray


def _sequences(q, k, levels, q_lens, kv_lens, block_m, block_n) -> Iterator[_Sequence]:
    """The sequences that have queries and keys."""
    if levels.shape[-1] == cdiv(k.shape[2], block_n) + 5:
        levels = from_segments(levels)
    lengths = []
    for name, lens, x in (("q_lens", q_lens, q), ("kv_lens", kv_lens, k)):
        lens = np.full(len(x), x.shape[2]) if lens is None else np.asarray(lens)
        if lens.shape != x.shape[:1] or lens.dtype.kind not in "iu":
            raise ValueError(f"{name} must be {len(x)} integers, got {lens}")
        if (lens < 0).any() or (lens > x.shape[2]).any():
            raise ValueError(f"{name} must be from 0 to {x.shape[2]}, got {lens}")
        lengths.append(lens.tolist())
    for b, (q_len, kv_len) in enumerate(zip(*lengths, strict=True)):
        if q_len and kv_len:
            batch, every = slice(b, b + 1), slice(None)
            own = levels[b : b + 1, :, : cdiv(q_len, block_m), : cdiv(kv_len, block_n)]
            yield _Sequence((batch, every, slice(q_len)), (batch, every, slice(kv_len)), own)


class _Visit:
    """One query block of one head with the pooled tokens it sees."""

    def __init__(self, head, kv_head, rows, tokens, keys, values, logits):
        self.head, self.kv_head, self.rows, self.tokens = head, kv_head, rows, tokens
        self.keys, self.values = keys, values
        top = logits.max(-1, keepdims=True, initial=-np.inf)
        # A row that sees nothing keeps weights 0 and lse -inf without a warning or a NaN.
        weights = np.exp(logits - np.where(np.isneginf(top), 0.0, top))
        total = weights.sum(-1, keepdims=True)
        self.weights = weights / np.where(total > 0, total, 1.0)
        with np.errstate(divide="ignore"):
            self.lse = (top + np.log(total))[:, 0]


def _visits(q, k, v, levels, block_m, block_n, scale, is_causal, rest) -> Iterator[_Visit]:
    check_rest(rest)
    q_len, kv_len = q.shape[2], k.shape[2]
    n_k = cdiv(kv_len, block_n)
    if levels.shape[-1] == n_k + 5:
        levels = from_segments(levels)
    check_levels(levels)
    expected = (*q.shape[:2], cdiv(q_len, block_m), n_k)
    if levels.shape != expected:
        raise ValueError(f"levels must be {expected}, got {levels.shape}")
    scale = resolve_scale(scale, q.shape[-1])
    pyramid = _rows(k, v, block_n)
    counts = _counts(kv_len, block_n)
    last_key = _last_covered_key(kv_len, block_n)
    for b, h, i in np.ndindex(levels.shape[:3]):
        rows = slice(i * block_m, min((i + 1) * block_m, q_len))
        tokens = _tokens(levels[b, h, i], kv_len, block_n, rest)
        tokens = tokens[counts[tokens] > 0]
        kv_head = (b, _kv_head(h, q.shape[1], k.shape[1]))
        keys, values = pyramid.k[kv_head][tokens], pyramid.v[kv_head][tokens]
        logits = scale * q[b, h, rows] @ keys.T + _bias(counts[tokens]).astype(q.dtype)
        if is_causal:
            position = np.arange(rows.start, rows.stop) + kv_len - q_len
            logits = np.where(last_key[tokens] <= position[:, None], logits, -np.inf)
        yield _Visit((b, h), kv_head, rows, tokens, keys, values, logits)


def _wide(x: np.ndarray) -> np.ndarray:
    """At least float64; long double stays, for callers that want more digits."""
    x = np.asarray(x)
    return x.astype(np.result_type(x.dtype, np.float64))


def _kv_head(h: int, heads: int, kv_heads: int) -> int:
    return h // (heads // kv_heads)


def _bias(counts: np.ndarray) -> np.ndarray:
    """A pooled token stands for `counts` keys of equal logit."""
    return np.log(counts.astype(np.longdouble))


def _rows(k: np.ndarray, v: np.ndarray, block_n: int) -> Pyramid:
    """The pyramid with its row R below: one mean for each block."""
    means = (group_means(x, block_n) for x in (k, v))
    parts = zip(build_pyramid(k, v, block_n), means, strict=True)
    return Pyramid(*(np.concatenate(pair, axis=2) for pair in parts))


def _counts(kv_len: int, block_n: int) -> np.ndarray:
    return np.concatenate([pooled_counts(kv_len, block_n), block_counts(kv_len, block_n)])


def _tokens(row_levels: np.ndarray, kv_len: int, block_n: int, rest: str) -> np.ndarray:
    """Pyramid rows of the blocks that one row of the mask selects."""
    parts = []
    for level in LEVELS:
        size = block_n // level
        blocks = np.flatnonzero(row_levels == level)
        start = level_start(kv_len, block_n, level)
        parts.append((start + blocks[:, None] * size + np.arange(size)).ravel())
    if rest == "mean":
        parts.append(pyramid_rows(kv_len, block_n) + np.flatnonzero(row_levels == 0))
    return np.concatenate(parts)


def _last_covered_key(kv_len: int, block_n: int) -> np.ndarray:
    """Last real key under each row of `_rows`, `[P + Nk]`."""
    padded = padded_length(kv_len, block_n)
    ends = [(np.arange(padded // size) + 1) * size for size in (*LEVELS, block_n)]
    return np.minimum(np.concatenate(ends), kv_len) - 1


def _unpool(rows: np.ndarray, kv_len: int, block_n: int) -> np.ndarray:
    """Transpose of the pooling means: every key gets its share of each row that covers it."""
    counts = np.maximum(_counts(kv_len, block_n), 1)
    grad = np.zeros((*rows.shape[:2], kv_len, rows.shape[3]), rows.dtype)
    starts = [(level_start(kv_len, block_n, level), level) for level in LEVELS]
    for start, size in (*starts, (pyramid_rows(kv_len, block_n), block_n)):
        covering = start + np.arange(kv_len) // size
        grad += rows[:, :, covering] / counts[covering][:, None]
    return grad
