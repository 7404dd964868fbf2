"""Products of a warpgroup with the tiles of a ring."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma

from psa_torch._triton.rings import tile_of, wait_full


@gluon.jit
def start_product(rows, ring, t, LAYOUT: gl.constexpr, FENCE: gl.constexpr = True):
    """Starts rows x^T, x the tile `t` of a ring, which is in place.

    FENCE: its rows were gathered by ordinary writes; tensor cores read through another path.
    """
    if FENCE:
        fence_async_shared()
    ROWS: gl.constexpr = rows.shape[0]
    TILE: gl.constexpr = ring.tiles.shape[1]
    zero = gl.zeros([ROWS, TILE], gl.float32, LAYOUT)
    columns = tile_of(ring, t).permute([1, 0])
    return warpgroup_mma(rows, columns, zero, use_acc=False, is_async=True)


@gluon.jit
def start_when_full(rows, ring, t, LAYOUT: gl.constexpr, FENCE: gl.constexpr = True):
    """`start_product` as soon as the tile is in place."""
    wait_full(ring, t)
    return start_product(rows, ring, t, LAYOUT, FENCE)
