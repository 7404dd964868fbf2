"""Pooled keys and values (specification, section 2), where `geometry` says they lie."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from shared_specs.constants import LEVELS
from shared_specs.geometry import cdiv, level_start, padded_length, pyramid_rows


class Pyramid(NamedTuple):
    """Keys and values at every level, `[B, Hk, P, D]` and `[B, Hk, P, Dv]`,
    `P = pyramid_rows(Lk, block_n)`."""

    k: np.ndarray
    v: np.ndarray


def pooled_counts(kv_len: int, block_n: int) -> np.ndarray:
    """Keys covered by each pyramid row, int32 `[P]`; 0 on rows past the end of the keys."""
    padded = padded_length(kv_len, block_n)
    counts = [np.clip(kv_len - np.arange(padded // level) * level, 0, level) for level in LEVELS]
    return np.concatenate(counts).astype(np.int32)


def block_counts(kv_len: int, block_n: int) -> np.ndarray:
    """Keys under the mean of each block, int32 `[Nk]`."""
    starts = np.arange(cdiv(kv_len, block_n)) * block_n
    return np.minimum(kv_len - starts, block_n).astype(np.int32)


def group_means(x: np.ndarray, size: int) -> np.ndarray:
    """Means over groups of `size` adjacent tokens of `[..., L, D]`, real tokens only.

    Wider than float32 stays as wide; anything else accumulates in float32, returned as float32.
    """
    length = x.shape[-2]
    groups = cdiv(length, size)
    dtype = np.result_type(x.dtype, np.float32)
    padded = np.zeros((*x.shape[:-2], groups * size, x.shape[-1]), dtype)
    padded[..., :length, :] = x
    sums = padded.reshape(*x.shape[:-2], groups, size, x.shape[-1]).sum(-2)
    counts = np.clip(length - np.arange(groups) * size, 1, size)
    return sums / counts[:, None].astype(dtype)


def build_pyramid(k: np.ndarray, v: np.ndarray, block_n: int) -> Pyramid:
    """Keys and values pooled by 1, 2, 4 and 8.

    Args:
        k, v: `[B, Hk, Lk, D]`, each with a D of its own.
        block_n: keys per block.

    Returns:
        Pyramid of `[B, Hk, P, D]` in the input dtype. A row is one mean over the real keys it
        covers, never a mean of rounded means; rows that cover none are zero.
    """

    def pool(x: np.ndarray) -> np.ndarray:
        length = x.shape[-2]
        rows = np.zeros((*x.shape[:-2], pyramid_rows(length, block_n), x.shape[-1]), x.dtype)
        for level in LEVELS:
            start = level_start(length, block_n, level)
            means = group_means(x, level)
            rows[..., start : start + means.shape[-2], :] = means
        return rows

    return Pyramid(pool(k), pool(v))
