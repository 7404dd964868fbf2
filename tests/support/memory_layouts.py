"""The same numbers elsewhere in memory, with NaN around them: reading a neighbour shows."""

import numpy as np
import torch
from torch import Tensor

from psa_torch.attention.triton.rows import Rows, rows_of_pyramid
from psa_torch.pyramid import build_pyramid, pool_levels
from shared_specs.pyramid import padded_length


def strided(x: Tensor) -> Tensor:
    """`[B, H, L, D]` with heads inside rows."""
    batch, heads, length, dim = x.shape
    wide = torch.full((batch, length, heads, dim + 8), torch.nan)
    view = wide[..., 4 : dim + 4].transpose(1, 2)
    view.copy_(x)
    return view


def rows_in_one_place(k: Tensor, v: Tensor, block_n: int) -> Rows:
    """As `rows_in_place`, but with all rows in one piece of memory, which ends with the values.

    The Gluon interpreter knows no addresses beyond the tensor that a pointer comes from.
    """
    pooled = pool_levels(k, v, block_n)
    parts = [pooled.v, k, pooled.k, v]
    gap = torch.full((3 * k.shape[-1],), torch.nan)
    memory = torch.cat([x for part in parts for x in (gap, part.flatten())])
    ends = np.cumsum([gap.numel() + part.numel() for part in parts])
    placed = [
        memory[end - part.numel() : end].view(part.shape)
        for part, end in zip(parts, ends, strict=True)
    ]
    pooled_v, k, pooled_k, v = placed
    return Rows(k, v, pooled_k, pooled_v, padded_length(k.shape[2], block_n))


def rows_copied(k: Tensor, v: Tensor, block_n: int) -> Rows:
    """A pyramid with its level 1."""
    return rows_of_pyramid(build_pyramid(k, v, block_n))
