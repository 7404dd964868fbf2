"""A product that the warp-specialised gradients share."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
)


@gluon.jit
def start_with_tile(rows, ring, full, t, SLOTS: gl.constexpr, LAYOUT: gl.constexpr):
    """Starts rows x^T, x the tile `t` of a ring, as soon as that is in place."""
    slot = t % SLOTS
    mbarrier.wait(full.index(slot), (t // SLOTS) & 1)
    # Gathered rows are ordinary writes; tensor cores read through another path.
    fence_async_shared()
    ROWS: gl.constexpr = rows.shape[0]
    TILE: gl.constexpr = ring.shape[1]
    zero = gl.zeros([ROWS, TILE], gl.float32, LAYOUT)
    return warpgroup_mma(rows, ring.index(slot).permute([1, 0]), zero, use_acc=False, is_async=True)
