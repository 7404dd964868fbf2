"""Rings of tiles in shared memory: some warps fill them, others empty them, nobody counts phases.

Tile `t` of all that ever pass has place `t % stages`. Every turn of the ring flips the phase that
its barriers wait for.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier


class Ring(NamedTuple):
    """Attributes:
    tiles: shared memory, a place after the other.
    full: a barrier for each place, complete when its tile has come.
    empty: the same for when it is no longer needed; rings that are emptied at once share theirs.
    """

    tiles: object
    full: object
    empty: object


@gluon.jit
def new_barriers(STAGES: gl.constexpr):
    """A barrier for each place of a ring; not initialised."""
    return gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())


@gluon.jit
def wait_turn(barriers, t, there=True):
    """Waits until the barrier of tile `t` is complete, if the tile is `there`."""
    STAGES: gl.constexpr = barriers.shape[0]
    mbarrier.wait(barriers.index(t % STAGES), (t // STAGES) & 1, pred=there)


@gluon.jit
def wait_full(ring, t, there=True):
    """Waits until tile `t` is in its place, if it is `there`."""
    wait_turn(ring.full, t, there)


@gluon.jit
def wait_empty(ring, t):
    """Waits until the place of tile `t` is free of the tile before."""
    STAGES: gl.constexpr = ring.empty.shape[0]
    mbarrier.wait(ring.empty.index(t % STAGES), (t // STAGES) & 1 ^ 1)


@gluon.jit
def release(ring, t):
    """Says that the caller no longer needs tile `t`."""
    STAGES: gl.constexpr = ring.empty.shape[0]
    mbarrier.arrive(ring.empty.index(t % STAGES), count=1)


@gluon.jit
def tile_of(ring, t):
    """The place of tile `t`."""
    STAGES: gl.constexpr = ring.full.shape[0]
    return ring.tiles.index(t % STAGES)


@gluon.jit
def stage_of(ring, t):
    """Number of the place of tile `t`."""
    STAGES: gl.constexpr = ring.full.shape[0]
    return t % STAGES
