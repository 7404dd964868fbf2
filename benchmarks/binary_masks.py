"""Binary masks of the cost of a pyramid mask, and in the forms that other libraries take."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.workloads import Workload

# FlexAttention's own block; smaller blocks cost it speed.
FLEX_BLOCK = 128


def binary_levels(scores: np.ndarray, levels: np.ndarray, workload: Workload) -> np.ndarray:
    """Levels 0 and 1 on `FLEX_BLOCK`-wide blocks, each row at the cost of its pyramid row.

    The best blocks by the same scores (the largest of the blocks merged) are kept; a row keeps
    its cost in whole wide blocks, rounded to the nearest, at least one. Under a causal mask the
    blocks on the diagonal are always kept.

    Args:
        scores: `[B, H, Nq, Nk]`.
        levels: int `[B, H, Nq, Nk]`, the pyramid mask.
        workload: gives the block sizes; `block_m` must be `FLEX_BLOCK`.
    """
    if workload.config.block_m != FLEX_BLOCK:
        raise ValueError(f"block_m must be {FLEX_BLOCK}, got {workload.config.block_m}")
    merged = FLEX_BLOCK // workload.config.block_n
    wide = -(-scores.shape[-1] // merged)
    padding = ((0, 0), (0, 0), (0, 0), (0, wide * merged - scores.shape[-1]))
    best = np.pad(scores, padding).reshape(*scores.shape[:-1], wide, merged).max(-1)
    cost = np.where(levels > 0, 1.0 / np.maximum(levels, 1), 0.0).sum(-1) / merged
    if workload.config.causal:
        rows, columns = np.arange(scores.shape[-2])[:, None], np.arange(wide)[None, :]
        best = np.where(columns == rows, np.inf, np.where(columns > rows, -1.0, best))
    kept = np.maximum(1, np.rint(cost)).astype(np.int64)
    rank = np.argsort(np.argsort(-best, axis=-1, kind="stable"), axis=-1)
    return ((rank < kept[..., None]) & (best >= 0)).astype(np.int32)


def block_mask(levels: np.ndarray, workload: Workload, device: torch.device):
    """FlexAttention's BlockMask of a binary mask; diagonal blocks partial under a causal mask."""
    from torch.nn.attention.flex_attention import BlockMask

    kept = torch.from_numpy(levels).to(device) > 0
    whole, partial = split_diagonal(kept, workload.config.causal)
    mask_mod = None
    if workload.config.causal:

        def mask_mod(batch, head, row, column):
            return row >= column

    return BlockMask.from_kv_blocks(
        *ordered(partial),
        *ordered(whole),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(workload.length, workload.length),
    )


def split_diagonal(kept: torch.Tensor, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks that are seen whole, and those on the diagonal of a causal mask, seen in part."""
    if not causal:
        return kept, torch.zeros_like(kept)
    diagonal = torch.eye(*kept.shape[-2:], dtype=torch.bool, device=kept.device)
    return kept & ~diagonal, kept & diagonal


def ordered(kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many blocks each row keeps, and all ids with the kept ones first."""
    order = torch.argsort(kept.int(), dim=-1, descending=True, stable=True)
    return kept.sum(-1).to(torch.int32), order.to(torch.int32)
