"""How far each key block may be pooled (specification, section 7)."""

from __future__ import annotations

import numpy as np

from shared_specs.config import PSAConfig
from shared_specs.geometry import cdiv

MIN_NORM_PRODUCT = np.float32(1e-12)


def similarity_cap(k: np.ndarray, config: PSAConfig) -> np.ndarray:
    """Largest level at which a key block's neighbours are still alike.

    Args:
        k: `[B, Hk, Lk, D]`.
        config: `block_n` and the three thresholds.

    Returns:
        int32 `[B, Hk, Nk]` in {1, 2, 4, 8}.
    """
    similarities = block_similarity(k, config.block_n)
    cap = np.ones(similarities[2].shape, np.int32)
    for level, threshold in config.similarity_thresholds.items():
        cap[similarities[level] > np.float32(threshold)] = level
    return cap


def block_similarity(k: np.ndarray, block_n: int) -> dict[int, np.ndarray]:
    """Mean cosine between the first and last key of each whole group of a block.

    Returns:
        {2, 4, 8} -> float32 `[B, Hk, Nk]`; -inf where a block has no whole group.
    """
    kv_len = k.shape[2]
    n_k = cdiv(kv_len, block_n)
    padded = np.zeros((*k.shape[:2], n_k * block_n, k.shape[3]), np.float64)
    padded[:, :, :kv_len] = k
    blocks = padded.reshape(*k.shape[:2], n_k, block_n, k.shape[3])
    real = np.minimum(kv_len - np.arange(n_k) * block_n, block_n)
    similarities = {}
    for level in (2, 4, 8):
        first, last = blocks[..., ::level, :], blocks[..., level - 1 :: level, :]
        norms = np.linalg.norm(first, axis=-1) * np.linalg.norm(last, axis=-1)
        cosine = (first * last).sum(-1) / np.maximum(norms, MIN_NORM_PRODUCT)
        groups = real // level
        whole = np.arange(block_n // level) < groups[:, None]
        total = np.where(whole, cosine, 0.0).sum(-1)
        mean = np.where(groups > 0, total / np.maximum(groups, 1), -np.inf)
        similarities[level] = mean.astype(np.float32)
    return similarities
