"""Work that a level mask really asks for (specification, section 9)."""

from __future__ import annotations

import numpy as np

from shared_specs.constants import LEVELS
from shared_specs.geometry import level_start
from shared_specs.pyramid import pooled_counts


def visited_tokens(
    levels: np.ndarray,
    kv_len: int,
    block_n: int,
    *,
    rest: str = "skip",
    candidates: np.ndarray | None = None,
) -> np.ndarray:
    """Pooled tokens that each query block visits, int64 `[B, H, Nq]`.

    Tokens that cover at least one key; a ragged last block has fewer.

    Args:
        levels: int `[B, H, Nq, Nk]`.
        kv_len, block_n: keys, and keys per block.
        rest: with 'mean' every candidate block of level 0 is one token.
        candidates: int `[Nq]`, as for `masks.density`; None means all blocks.
    """
    counts = pooled_counts(kv_len, block_n)
    n_k = levels.shape[-1]
    visited = np.zeros(levels.shape[:-1], np.int64)
    for level in LEVELS:
        start = level_start(kv_len, block_n, level)
        rows = counts[start : start + n_k * block_n // level].reshape(n_k, -1)
        visited += ((levels == level) * (rows > 0).sum(-1)).sum(-1)
    if rest == "mean":
        left = levels == 0
        if candidates is not None:
            left = left & (np.arange(n_k) < np.asarray(candidates)[:, None])
        visited += left.sum(-1)
    return visited


def attention_flops(
    levels: np.ndarray,
    q_len: int,
    kv_len: int,
    head_dim: int,
    block_m: int,
    block_n: int,
    *,
    value_dim: int | None = None,
    rest: str = "skip",
    candidates: np.ndarray | None = None,
) -> int:
    """Multiplications and additions of the two products of the forward pass.

    2 * (head_dim + value_dim) for each (query, visited pooled token) pair; causal hiding inside a
    visited block is not subtracted. `value_dim` None means `head_dim`; `rest` and `candidates` as
    in `visited_tokens`.
    """
    rows = np.minimum(q_len - np.arange(levels.shape[-2]) * block_m, block_m)
    visited = visited_tokens(levels, kv_len, block_n, rest=rest, candidates=candidates)
    value_dim = head_dim if value_dim is None else value_dim
    return int(2 * (head_dim + value_dim) * (visited * rows).sum())
