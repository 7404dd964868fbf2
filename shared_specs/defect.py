"""What pooling a key block would lose: estimated defects (specification, section 5, `defect`)."""

from __future__ import annotations

import numpy as np

from shared_specs.geometry import cdiv


def defect_offsets(block_m: int, sample_m: int) -> np.ndarray:
    """Evenly spaced offsets of the sampled queries in their block, int64 `[sample_m]`.

    Raises:
        ValueError: `sample_m` does not divide `block_m`.
    """
    if sample_m < 1 or block_m % sample_m:
        raise ValueError(f"sample_m must be a divisor of block_m={block_m}, got {sample_m}")
    return np.arange(sample_m) * (block_m // sample_m) + block_m // (2 * sample_m)


def defect_scores(
    q: np.ndarray,
    k: np.ndarray,
    *,
    block_m: int,
    block_n: int,
    sample_m: int,
    scale: float,
    causal: bool,
    rest_mean: bool,
) -> np.ndarray:
    """Mean squared mass that each block would lose at level 2, 4, 8 and at rest, in float64.

    Args:
        q: `[B, H, Lq, D]`.
        k: `[B, Hk, Lk, D]`, `H % Hk == 0`.
        block_m, block_n, sample_m: queries and keys per block, sampled queries per query block.
        scale: factor on q.k.
        causal: a query sees keys up to its own position; the last query sees the last key.
        rest_mean: a block at rest is seen as one mean; otherwise its whole mass is lost.

    Returns:
        float32 `[B, H, Nq, Nk, 4]`, rounded once.

    Raises:
        ValueError: `sample_m` does not divide `block_m`.
    """
    offsets = defect_offsets(block_m, sample_m)
    (b, h, q_len, _), (_, h_kv, kv_len, _) = q.shape, k.shape
    n_q, n_k = cdiv(q_len, block_m), cdiv(kv_len, block_n)
    at = np.minimum(np.arange(n_q)[:, None] * block_m + offsets, q_len - 1).ravel()
    seen = np.arange(kv_len) <= (at[:, None] + kv_len - q_len if causal else kv_len)
    scores = np.zeros((b, h, n_q, n_k, 4))
    for i, j in np.ndindex(b, h):
        keys = k[i, j // (h // h_kv)].astype(np.float64)
        logits = scale * q[i, j, at].astype(np.float64) @ keys.T
        top = np.where(seen, logits, -np.inf).max(-1, keepdims=True)
        shifted = logits - np.where(np.isneginf(top), 0.0, top)
        mass = _masses(shifted, seen, 1, block_n)
        total = mass.sum(-1, keepdims=True)
        total = np.where(total > 0, total, 1.0)
        for column, level in enumerate((2, 4, 8, block_n)):
            kept = 0.0 if level == block_n and not rest_mean else 1.0
            lost = (mass - kept * _masses(shifted, seen, level, block_n)) / total
            scores[i, j, ..., column] = np.square(lost).reshape(n_q, sample_m, n_k).mean(1)
    return scores.astype(np.float32)


def _masses(logits: np.ndarray, seen: np.ndarray, level: int, block_n: int) -> np.ndarray:
    """count * exp(mean logit) of the wholly visible pooled tokens, summed over blocks."""
    starts = np.arange(0, logits.shape[-1], level)
    count = np.minimum(starts + level, logits.shape[-1]) - starts
    mean = np.add.reduceat(logits, starts, axis=-1) / count
    whole = np.logical_and.reduceat(seen, starts, axis=-1)
    weights = np.where(whole, count * np.exp(np.where(whole, mean, 0.0)), 0.0)
    return np.add.reduceat(weights, np.arange(0, len(starts), block_n // level), axis=-1)
