"""Where the warp-specialised kernels find the rows that they copy.

Level 1 of the pyramid is the keys and values themselves. Where they lie as a pyramid would hold
them, they are read there, and only the levels above are made: less than half the bytes to write.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from psa_torch._eager import recording
from psa_torch._triton.launch import Distance
from psa_torch.pyramid import Pyramid, build_pyramid, pool_levels
from shared_specs.geometry import cdiv, padded_length

ALIGNMENT = 16
"""Bytes; copies start at multiples of it."""

FARTHEST = 2**30
"""Rows of memory between two arrays that a kernel's 32-bit row numbers can bridge."""


class Rows(NamedTuple):
    """Rows of keys and values, all contiguous, `[B, Hk, rows, D]`.

    Attributes:
        k, v: row r is pyramid row r, for the rows of level 1.
        pooled_k, pooled_v: row r is pyramid row `r + skipped`, for those of the other levels.
        skipped: pyramid rows that the pooled ones leave out at the start.
    """

    k: Tensor
    v: Tensor
    pooled_k: Tensor
    pooled_v: Tensor
    skipped: int

    def of_level(self, g: int) -> tuple[Tensor, Tensor, int, int]:
        """Where the rows of level `2**g` are: arrays of keys and of values, the rows of a head in
        them, and how many pyramid rows they leave out at the start."""
        if g == 0:
            return self.k, self.v, self.k.shape[2], 0
        return self.pooled_k, self.pooled_v, self.pooled_k.shape[2], self.skipped

    def places(self) -> tuple[int, int, int, int, int]:
        """Rows of a head in `k`, rows of a head in `pooled_k`, rows skipped, and how many rows of
        memory lie between the start of `k` and that of `pooled_k`, and the same for v."""
        k_apart, v_apart = (
            Distance(x, pooled, x.shape[-1] * x.element_size(), FARTHEST)
            for x, pooled in ((self.k, self.pooled_k), (self.v, self.pooled_v))
        )
        return self.k.shape[2], self.pooled_k.shape[2], self.skipped, k_apart, v_apart


def rows_of_pyramid(pyramid: Pyramid) -> Rows:
    """All levels in one place."""
    return Rows(*pyramid, *pyramid, 0)


def rows_in_place(k: Tensor, v: Tensor, block_n: int) -> Rows:
    """Rows of `[B, Hk, Lk, D]` keys and values: level 1 where it lies, if it can be read there."""
    readable = all(x.is_contiguous() and x.data_ptr() % ALIGNMENT == 0 for x in (k, v))
    if readable and not recording.is_far:
        pooled = pool_levels(k, v, block_n)
        if all(_in_reach(*pair) for pair in zip((k, v), pooled, strict=True)):
            return Rows(k, v, *pooled, padded_length(k.shape[2], block_n))
    return rows_of_pyramid(build_pyramid(k, v, block_n))


def aligned_rows(x: Tensor) -> Tensor:
    """`x` `[B, H, L, D]` itself if a copy can start at each of its rows, else such a copy of it.

    Strides are asked to be multiples of 16 numbers: that is what a compiled kernel knows of them.
    """
    dense = x.stride(-1) == 1 and not any(step % 16 for step in x.stride()[:3])
    if dense and x.data_ptr() % ALIGNMENT == 0:
        return x
    # Rows of 72, say, stand at every 80th number then.
    apart = cdiv(x.shape[-1], 16) * 16
    rows = torch.empty(*x.shape[:-1], apart, dtype=x.dtype, device=x.device)
    return rows[..., : x.shape[-1]].copy_(x)


def _in_reach(x: Tensor, pooled: Tensor) -> bool:
    """Whether a whole number of rows lies between them, and not too large a one."""
    rows, rest = _apart(x, pooled)
    return rest == 0 and abs(rows) < FARTHEST


def _apart(x: Tensor, pooled: Tensor) -> tuple[int, int]:
    """Rows of memory from the start of one to that of the other, and the bytes left over."""
    return divmod(pooled.data_ptr() - x.data_ptr(), x.shape[-1] * x.element_size())
