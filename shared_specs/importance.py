"""How much each key block matters to each query block (specification, section 5).

Sums and products run in float64 and the result is rounded once to float32, so that this page is
the value the frameworks' float32 arithmetic is compared with.
"""

from __future__ import annotations

import numpy as np

from shared_specs.config import PSAConfig
from shared_specs.defect import defect_scores
from shared_specs.geometry import cdiv
from shared_specs.pyramid import group_means
from shared_specs.sampling import SamplePlan


def block_scores(q: np.ndarray, k: np.ndarray, config: PSAConfig) -> np.ndarray:
    """Scores of every (query block, key block) pair by `config.importance`.

    Args:
        q: `[B, H, Lq, D]`.
        k: `[B, Hk, Lk, D]`, `H % Hk == 0`.
        config: block sizes, estimator and its parameters, `causal`, `scale`.

    Returns:
        float32 `[B, H, Nq, Nk]`, at least 0, comparable inside a row only; 0 where no sampled
        key is visible. For 'defect' `[B, H, Nq, Nk, 4]`: what the block loses at level 2, 4, 8
        and at rest.
    """
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


def pooled_scores(q: np.ndarray, k: np.ndarray, config: PSAConfig) -> np.ndarray:
    """Rows and columns are means over groups of `importance_pool` adjacent tokens.

    Under a causal mask a group of keys is visible when its first key is at or before the last
    query of the group.
    """
    size, q_len, kv_len = config.importance_pool, q.shape[2], k.shape[2]
    rows = group_means(q.astype(np.float64), size)
    cols = group_means(k.astype(np.float64), size)
    row_last = np.minimum((np.arange(rows.shape[2]) + 1) * size, q_len) - 1
    col_first = np.arange(cols.shape[2]) * size
    visible = _visible(row_last, col_first, q_len, kv_len, config)
    row_block = np.arange(rows.shape[2]) * size // config.block_m
    col_block = col_first // config.block_n
    return _ratio_to_row_maximum(rows, cols, visible, row_block, col_block, config)


def sampled_scores(q: np.ndarray, k: np.ndarray, config: PSAConfig) -> np.ndarray:
    """Rows and columns are tokens at fixed offsets of each block.

    Offsets past the end of the sequence are clamped to its last token. Under a causal mask a key
    is visible when it is at or before the query.
    """
    q_len, kv_len = q.shape[2], k.shape[2]
    row_at, row_block = _sampled_positions(config.query_samples, q_len)
    col_at, col_block = _sampled_positions(config.key_samples, kv_len)
    visible = _visible(row_at, col_at, q_len, kv_len, config)
    rows, cols = q[:, :, row_at].astype(np.float64), k[:, :, col_at].astype(np.float64)
    return _ratio_to_row_maximum(rows, cols, visible, row_block, col_block, config)


def antidiagonal_scores(q: np.ndarray, k: np.ndarray, config: PSAConfig) -> np.ndarray:
    """Softmax over tiles of the q.k sums along each tile's antidiagonal, summed over a block.

    A tile pairs `g = antidiagonal_stride` queries with `g` keys: query `i` meets key `g - 1 - i`.
    Tokens past the end of the sequence add nothing. Under a causal mask a tile is visible when
    its first key is at or before its last query.
    """
    g, q_len, kv_len = config.antidiagonal_stride, q.shape[2], k.shape[2]
    rows = _tiles(q, g)
    cols = _tiles(k, g)[..., ::-1, :]
    rows, cols = (x.reshape(*x.shape[:3], -1) for x in (rows, cols))
    row_last = np.minimum((np.arange(rows.shape[2]) + 1) * g, q_len) - 1
    col_first = np.arange(cols.shape[2]) * g
    visible = _visible(row_last, col_first, q_len, kv_len, config)
    row_block, col_block = row_last // config.block_m, col_first // config.block_n
    scale = config.resolved_scale(q.shape[-1])
    scores = np.zeros((*q.shape[:2], row_block[-1] + 1, col_block[-1] + 1))
    for b, h in np.ndindex(q.shape[:2]):
        logits = np.where(visible, scale * rows[b, h] @ cols[b, _kv_head(h, q, k)].T, -np.inf)
        top = logits.max(-1, keepdims=True)
        weights = np.exp(logits - np.where(np.isneginf(top), 0.0, top))
        total = weights.sum(-1, keepdims=True)
        weights /= np.where(total > 0, total, 1.0)
        np.add.at(scores[b, h], (row_block[:, None], col_block[None, :]), weights)
    return scores.astype(np.float32)


def _ratio_to_row_maximum(rows, cols, visible, row_block, col_block, config) -> np.ndarray:
    """exp(logit - row maximum), its largest value over each (query block, key block)."""
    scale = config.resolved_scale(rows.shape[-1])
    scores = np.zeros((*rows.shape[:2], row_block[-1] + 1, col_block[-1] + 1))
    for b, h in np.ndindex(rows.shape[:2]):
        logits = np.where(visible, scale * rows[b, h] @ cols[b, _kv_head(h, rows, cols)].T, -np.inf)
        top = logits.max(-1, keepdims=True)
        weights = np.exp(logits - np.where(np.isneginf(top), 0.0, top))
        np.maximum.at(scores[b, h], (row_block[:, None], col_block[None, :]), weights)
    return scores.astype(np.float32)


def _kv_head(h: int, q: np.ndarray, k: np.ndarray) -> int:
    return h // (q.shape[1] // k.shape[1])


def _visible(row_at, col_at, q_len: int, kv_len: int, config: PSAConfig) -> np.ndarray:
    """Columns whose key position is at or before the row's query position."""
    if not config.causal:
        return np.ones((len(row_at), len(col_at)), bool)
    return col_at[None, :] <= row_at[:, None] + (kv_len - q_len)


def _sampled_positions(plan: SamplePlan, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Token and block of every sample."""
    blocks = cdiv(length, plan.block)
    at = np.arange(blocks)[:, None] * plan.block + plan.offsets[None, :]
    return np.minimum(at, length - 1).ravel(), np.repeat(np.arange(blocks), plan.count)


def _tiles(x: np.ndarray, size: int) -> np.ndarray:
    """`[B, H, L, D]` to float64 `[B, H, tiles, size, D]`, zeros past the end."""
    tiles = cdiv(x.shape[2], size)
    padded = np.zeros((*x.shape[:2], tiles * size, x.shape[3]))
    padded[:, :, : x.shape[2]] = x
    return padded.reshape(*x.shape[:2], tiles, size, x.shape[3])
