"""Which pyramid rows each query block visits, tile by tile.

The unit is a run: `block_n // 8` adjacent rows of the pyramid, what one block has at level 8. A
block at level `l` is `8 // l` runs, and every level starts on a run, so a pyramid of `P` rows is
an array of `P // run` runs and a row of the mask is a list of run ids.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from psa_jax.attention.gather.shape import Shape
from psa_jax.table import Table
from shared_specs.constants import LEVELS
from shared_specs.geometry import cdiv

RUNS_PER_BLOCK = np.array([LEVELS[-1] // level for level in LEVELS], np.int32)
"""Runs of a block at each level."""


class Visit(NamedTuple):
    """The runs that query blocks read, in order; int32 `[B, Hk, G, chunk, places]`.

    Attributes:
        run: its id; in unused places the last one again.
        of_level: its id among the runs of its level.
        level: logarithm of its level, to base 2.
        used: whether the query block has that many.
    """

    run: Array
    of_level: Array
    level: Array
    used: Array


class Tile(NamedTuple):
    """What a chunk of query blocks reads together.

    Attributes:
        runs: int32 `[B, Hk, G, chunk, places]`, run ids.
        bias: `[B, Hk, G, chunk, places * run]`, log of the keys a row stands for; the dtype's
            `hidden` in unused places and on rows that cover no key.
        last_key: int32, like bias, last key a row covers; None when not causal.
    """

    runs: Array
    bias: Array
    last_key: Array | None

    def first(self, rows: int, shape: Shape) -> "Tile":
        """Its first rows."""
        return Tile(
            self.runs[..., : rows // shape.run],
            self.bias[..., :rows],
            None if self.last_key is None else self.last_key[..., :rows],
        )


class Walk(NamedTuple):
    """The tiles of one chunk of query blocks.

    Attributes:
        tiles: all that a query block can have, on a new leading axis.
        used: int32, how many the fullest query block has.
    """

    tiles: Tile
    used: Array

    def tile(self, index: Array) -> Tile:
        return jax.tree.map(
            lambda x: lax.dynamic_index_in_dim(x, index, 0, keepdims=False), self.tiles
        )


def hidden(dtype) -> float:
    """Logit of a row that is not there: beaten by any real one, and far from overflow."""
    return float(jnp.finfo(dtype).min) / 2


def tiles_used(counts: Array, shape: Shape, tile_rows: int) -> Array:
    """Tiles of the fullest query block, int32 `[]`, of a table's counts `[..., 4]`."""
    rows = (counts * RUNS_PER_BLOCK).sum(-1, dtype=jnp.int32).max() * shape.run
    return (rows + tile_rows - 1) // tile_rows


def visit(table: Table, shape: Shape, places: int) -> Visit:
    """The first `places` runs of every query block.

    Args:
        table: entries `[B, Hk, G, chunk, Nk]` and counts `[B, Hk, G, chunk, 4]`.
        shape: the call.
        places: how many.
    """
    runs = table.counts * RUNS_PER_BLOCK
    # [..., 4, 1], to meet the places of the list on the last axis.
    run_end = jnp.cumsum(runs, -1, dtype=jnp.int32)[..., None]
    run_begin = run_end - runs[..., None]
    entry_begin = (jnp.cumsum(table.counts, -1, dtype=jnp.int32) - table.counts)[..., None]
    place = jnp.arange(places, dtype=jnp.int32)
    total = run_end[..., -1, :]
    used = place < total
    # Places past the end read the last run again, so that no row outside the mask is touched.
    place = jnp.clip(place, 0, jnp.maximum(total - 1, 0))
    level = (place[..., None, :] >= run_end[..., :-1, :]).sum(-2, dtype=jnp.int32)

    def of_level(per_level):
        """Each place's own value out of four, without a gather."""
        return sum(jnp.where(level == g, per_level[..., g, :], 0) for g in range(len(LEVELS)))

    within = place - of_level(run_begin)
    entry = jnp.clip(of_level(entry_begin) + (within >> (3 - level)), 0, shape.k_blocks - 1)
    block = jnp.take_along_axis(table.entries, entry, -1, mode="promise_in_bounds")
    run_of_level = (block << (3 - level)) + (within & ((8 >> level) - 1))
    starts = [shape.level_start(g) // shape.run for g in range(len(LEVELS))]
    run = run_of_level + jnp.asarray(starts, jnp.int32)[level]
    return Visit(run, run_of_level, level, used)


def as_tile(visit: Visit, shape: Shape, dtype) -> Tile:
    """All places of a visit in one tile, with a bias of the given dtype."""
    level = visit.level[..., None]
    token = visit.of_level[..., None] * shape.run + jnp.arange(shape.run, dtype=jnp.int32)
    first_key, size = token << level, 1 << level
    covered = jnp.clip(shape.kv_len - first_key, 0, size)
    real = visit.used[..., None] & (covered > 0)
    bias = jnp.where(real, jnp.log(jnp.maximum(covered, 1).astype(dtype)), hidden(dtype))
    last_key = None
    if shape.is_causal:
        last_key = _join_last(jnp.minimum(first_key + size, shape.kv_len) - 1)
    return Tile(visit.run, _join_last(bias), last_key)


def walk(table: Table, shape: Shape, dtype, tile_rows: int) -> Walk:
    """The tiles of a chunk.

    Args:
        table: entries `[B, Hk, G, chunk, Nk]` and counts `[B, Hk, G, chunk, 4]`.
        shape: the call.
        dtype: of the bias.
        tile_rows: rows of a tile.
    """
    tiles = cdiv(shape.most_rows, tile_rows)
    rows = as_tile(visit(table, shape, tiles * tile_rows // shape.run), shape, dtype)
    split = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(*x.shape[:-1], tiles, -1), -2, 0), rows)
    return Walk(split, tiles_used(table.counts, shape, tile_rows))


def sees_any(table: Table, position: Array, shape: Shape) -> Array:
    """Whether each query sees a row at all, bool `[B, Hk, G, chunk, block_m]`.

    Known from the table, so that the maximal logit is of no use but inside the softmax: XLA then
    makes product and exponential in one pass.

    Args:
        table: entries `[B, Hk, G, chunk, Nk]` and counts `[B, Hk, G, chunk, 4]`.
        position: int32 `[chunk, block_m]`, key position of each query.
        shape: the call.
    """
    if not shape.is_causal:
        return jnp.broadcast_to(
            (table.counts > 0).any(-1, keepdims=True), (*table.counts.shape[:-1], shape.block_m)
        )
    begin = jnp.cumsum(table.counts, -1, dtype=jnp.int32) - table.counts
    begin = jnp.minimum(begin, shape.k_blocks - 1)
    block = jnp.take_along_axis(table.entries, begin, -1, mode="promise_in_bounds")
    last_key = jnp.minimum(block * shape.block_n + np.array(LEVELS, np.int32), shape.kv_len) - 1
    last_key = jnp.where(table.counts > 0, last_key, jnp.iinfo(jnp.int32).max)
    return last_key.min(-1, keepdims=True) <= position


def _join_last(x: Array) -> Array:
    """The last two axes as one."""
    return x.reshape(*x.shape[:-2], -1)
