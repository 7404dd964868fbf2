"""The producer side that the forward and dq kernels share: walk a table row, copy its tiles.

A thread block has two consumer warpgroups of 64 query rows. At `block_m` 128 both walk the same
table row and share one stream of tiles and one producer warpgroup; at `block_m` 64 each
has its own row, stream and producer.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from psa_jax._mosaic.launch import scratch
from psa_jax._mosaic.products import operand
from psa_jax.attention.mosaic.configs import WalkConfig
from psa_jax.attention.mosaic.geometry import CHUNK, CONSUMERS, ROWS, TiledGeometry
from psa_jax.attention.mosaic.pyramid_rows import PyramidRows, copy_rows
from psa_jax.attention.mosaic.query_plan import ENDS, FIRST, HALF, TAIL, read
from shared_specs.constants import LEVELS


@dataclasses.dataclass(frozen=True)
class Walk:
    """Static facts of one kernel that walks the table."""

    geometry: TiledGeometry
    config: WalkConfig
    heads: int
    kv_heads: int
    batch: int
    blocks: int
    interpreted: bool

    @property
    def shared(self) -> bool:
        """Whether both consumers walk the same row."""
        return self.geometry.block_m != ROWS

    @property
    def streams(self) -> int:
        return 1 if self.shared else CONSUMERS

    @property
    def items(self) -> int:
        """Query tiles in all; each thread block takes every `blocks`-th."""
        return self.batch * self.heads * self.geometry.query_tiles

    def items_of_block(self) -> jax.Array:
        return lax.div(self.items - lax.axis_index("block") + self.blocks - 1, self.blocks)

    def locate(self, n: jax.Array, stream: jax.Array | int) -> Place:
        """The `n`-th item of this thread block, as seen by a stream."""
        tiles = self.geometry.query_tiles
        item = lax.axis_index("block") + n * self.blocks
        head = lax.div(item, tiles)
        tile = lax.rem(item, tiles)
        if self.geometry.is_causal:
            tile = tiles - 1 - tile  # the longest rows first
        row = head * self.geometry.padded_q_blocks + tile * self.streams + stream
        kv_head = lax.div(head, self.heads // self.kv_heads)
        return Place(head=head, kv_head=kv_head, row=row, first_query=tile * (CONSUMERS * ROWS))

    def stage(self, tile: jax.Array, stream: jax.Array | int) -> jax.Array:
        """Stage of the `tile`-th tile of a stream, counted from the start of the kernel."""
        return lax.rem(tile, self.config.stages) + stream * self.config.stages

    def query_stage(self, n: jax.Array, consumer: jax.Array | int) -> jax.Array:
        """Buffer of a consumer's `n`-th query tile."""
        return lax.rem(n, self.config.query_stages) * CONSUMERS + consumer

    def drain_queries(self, items: jax.Array, consumer: int, empty) -> None:
        """Wait until a consumer has released every query tile."""

        def wait(n, _):
            plgpu.barrier_wait(empty.at[self.query_stage(n, consumer)])

        lax.fori_loop(jnp.maximum(items - self.config.query_stages, 0), items, wait, None)


@dataclasses.dataclass(frozen=True)
class Place:
    """One query tile: its head, its key/value head, its table row and its first query row."""

    head: jax.Array
    kv_head: jax.Array
    row: jax.Array
    first_query: jax.Array


@scratch
class Tiles:
    """Buffers that the producer fills and the barriers that guard them, indexed by stage."""

    keys: Any
    values: Any
    covers: Any
    keys_full: Any
    keys_empty: Any
    values_full: Any
    values_empty: Any
    covers_full: Any


def tile_memory(walk: Walk, head_dim: int, dtype) -> Tiles:
    """Types of what the tiles of a walk take."""
    stages = walk.streams * walk.config.stages
    tile, chunks = walk.geometry.tile, walk.geometry.chunks
    readers = CONSUMERS // walk.streams
    rows = operand((stages, tile, head_dim), dtype)
    return Tiles(
        keys=rows,
        values=rows,
        covers=plgpu.SMEM((stages, tile), jnp.int32),
        keys_full=plgpu.Barrier(num_arrivals=chunks, num_barriers=stages),
        keys_empty=plgpu.Barrier(num_arrivals=readers, num_barriers=stages),
        values_full=plgpu.Barrier(num_arrivals=chunks, num_barriers=stages),
        values_empty=plgpu.Barrier(num_arrivals=readers, num_barriers=stages),
        covers_full=plgpu.Barrier(num_barriers=stages),
    )


def level_of_tile(t: jax.Array, ends: list[jax.Array]) -> jax.Array:
    """log2 of the level of the `t`-th full tile, from the running ends of the levels."""
    return sum((t >= end).astype(jnp.int32) for end in ends[:-1])


def copy_row(
    walk: Walk, place: Place, first_tile, stream, k: PyramidRows, v: PyramidRows, plan, tiles: Tiles
):
    """Copy every tile of one table row, in the order in which consumers take them.

    Args:
        first_tile: tiles that this stream has had before.
        k, v: references.

    Returns:
        The same count after this row.
    """
    geometry = walk.geometry
    spans = [read(plan.spans, place.row, i) for i in range(TAIL + 1)]
    ends, first = spans[ENDS], spans[FIRST]

    def load(t, starts, rows, *, level=None, covers=None):
        stage = walk.stage(t, stream)
        reused = t >= walk.config.stages

        def copies(source, target, full):
            first_rows = starts()
            for c, start in enumerate(first_rows):
                copy_rows(
                    source,
                    place.kv_head,
                    start,
                    rows,
                    target.at[stage, pl.ds(c * rows, rows)],
                    full.at[stage],
                    geometry=geometry,
                    level=level,
                )
            for _ in range(geometry.chunks - len(first_rows)):
                plgpu.barrier_arrive(full.at[stage])

        pl.when(reused)(lambda: plgpu.barrier_wait(tiles.keys_empty.at[stage]))
        copies(k, tiles.keys, tiles.keys_full)
        pl.when(reused)(lambda: plgpu.barrier_wait(tiles.values_empty.at[stage]))
        if covers is not None:
            plgpu.copy_gmem_to_smem(covers, tiles.covers.at[stage], tiles.covers_full.at[stage])
        copies(v, tiles.values, tiles.values_full)

    def level_tile(g, tile):
        """First rows of the runs of the `tile`-th tile of level index `g`, and their length."""
        pitch = geometry.pitch[g]
        run = math.gcd(pitch, geometry.tile)
        starts = []
        for c in range(geometry.tile // run):
            row = tile * geometry.tile + c * run
            block = plan.entries[place.row, first[g] + lax.div(row, pitch)]
            starts.append(geometry.start[g] + block * pitch + lax.rem(row, pitch))
        return (lambda: starts), run

    for g in geometry.dense_levels:
        begin = ends[g - 1] if g else jnp.int32(0)

        def full_tile(t, _, g=g, begin=begin):
            load(first_tile + t, *level_tile(g, t - begin), level=g)

        lax.fori_loop(begin, ends[g], full_tile, None)

    done = first_tile + ends[-1]
    if plan.half_covers is not None:

        def half_tile(t, _):
            g = len(LEVELS) - 1
            load(done + t, *level_tile(g, t), level=g, covers=plan.half_covers.at[0, 0])

        lax.fori_loop(0, spans[HALF], half_tile, None)
        done = done + spans[HALF]

    def tail_tile(t, _):
        def starts():
            # Read for the keys and again for the values: there are no registers to keep them in.
            chunk = t * geometry.chunks
            return [plan.tail_start[place.row, chunk + c] for c in range(geometry.chunks)]

        load(done + t, starts, CHUNK, covers=plan.tail_covers.at[place.row, t])

    lax.fori_loop(0, spans[TAIL], tail_tile, None)
    return done + spans[TAIL]


def drain(walk: Walk, tiles_done, stream, tiles: Tiles) -> None:
    """Wait until consumers have released every tile: no barrier may be left half way."""

    def wait(t, _):
        stage = walk.stage(t, stream)
        plgpu.barrier_wait(tiles.keys_empty.at[stage])
        plgpu.barrier_wait(tiles.values_empty.at[stage])

    lax.fori_loop(jnp.maximum(tiles_done - walk.config.stages, 0), tiles_done, wait, None)
