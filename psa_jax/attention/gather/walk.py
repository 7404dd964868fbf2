"""Which pyramid rows each query block visits, tile by tile.

The unit is a run: `block_n // 8` adjacent rows of the pyramid, what one block has at level 8. A
block at level `l` is `8 // l` runs, and every level starts on a run, so a pyramid of `P` rows is
an array of `P // run` runs and a row of the mask is a list of run ids.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from psa_jax.pyramid import accumulator
from psa_jax.table import Table
from shared_specs.constants import LEVELS
from shared_specs.pyramid import level_start, pyramid_rows

TILE_ROWS = 256
"""Pyramid rows of one tile: little waste on a part-full last tile, enough for fast products."""

CPU_BLOCKS, OTHER_BLOCKS = 8, 128
"""Query blocks (over batch and heads) taken at a time: a cache full, or enough for many cores."""

ONE_PASS_BLOCKS = 4
"""The same for a forward pass in one pass (see below), which holds more of each block at a time."""

ONE_PASS_ROWS, ONE_PASS_STEP = 2048, 64
"""On a CPU the forward pass takes up to so many rows at once, in a program for each multiple of the
step: fine enough that few rows are multiplied for nothing, and still few programs to compile."""

LOOP_TILES = 4
"""Tiles it takes together where the rows are more. Products of a few hundred rows leave its cores
waiting for each other."""

RUNS_PER_BLOCK = np.array([LEVELS[-1] // level for level in LEVELS], np.int32)
"""Runs of a block at each level."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """The static side of one call, for grouped queries `[B, Hk, G, Lq, D]`."""

    batch: int
    kv_heads: int
    group: int
    q_len: int
    kv_len: int
    head_dim: int
    block_m: int
    block_n: int
    scale: float
    is_causal: bool
    cpu_blocks: int = CPU_BLOCKS

    @classmethod
    def of(cls, q, k, *, block_m: int, block_n: int, scale: float, is_causal: bool) -> "Shape":
        """From q `[B, H, Lq, D]` and k `[B, Hk, Lk, D]`."""
        (b, h, q_len, d), (_, h_kv, kv_len, _) = q.shape, k.shape
        return cls(b, h_kv, h // h_kv, q_len, kv_len, d, block_m, block_n, scale, is_causal)

    def one_head(self) -> "Shape":
        """The same call for one batch entry and key head."""
        return dataclasses.replace(self, batch=1, kv_heads=1)

    @property
    def run(self) -> int:
        """Rows of a run."""
        return self.block_n // LEVELS[-1]

    @property
    def runs(self) -> int:
        """Runs of the pyramid."""
        return pyramid_rows(self.kv_len, self.block_n) // self.run

    @property
    def n_q(self) -> int:
        return -(-self.q_len // self.block_m)

    @property
    def n_k(self) -> int:
        return -(-self.kv_len // self.block_n)

    @property
    def most_rows(self) -> int:
        """Most pyramid rows that a query block can have: all its key blocks at level 1."""
        return self.n_k * self.block_n

    @property
    def tile_rows(self) -> int:
        return min(TILE_ROWS, self.most_rows)

    @property
    def one_pass_rows(self) -> tuple[int, ...]:
        """Rows, ascending, that the forward pass has a program for which takes them all at once.

        None where several key heads are taken together: those go tile by tile, in bounded memory.
        """
        if jax.default_backend() != "cpu" or self.batch * self.kv_heads > 1:
            return ()
        most = min(ONE_PASS_ROWS, self.most_rows)
        return (*range(ONE_PASS_STEP, most, ONE_PASS_STEP), most)

    @property
    def loop_rows(self) -> int:
        """Rows of a tile where the forward pass goes tile by tile."""
        return self.tile_rows * (LOOP_TILES if self.one_pass_rows else 1)

    @property
    def chunk(self) -> int:
        """Query blocks of each head that are taken at a time."""
        wanted = self.cpu_blocks if jax.default_backend() == "cpu" else OTHER_BLOCKS
        return min(self.n_q, max(1, wanted // (self.batch * self.kv_heads * self.group)))

    @property
    def chunks(self) -> int:
        return -(-self.n_q // self.chunk)

    def group_heads(self, x: Array) -> Array:
        """`[B, H, ...]` to `[B, Hk, G, ...]`."""
        return x.reshape(self.batch, self.kv_heads, self.group, *x.shape[2:])

    def split_rows(self, x: Array) -> Array:
        """`[B, Hk, G, Lq, ...]` to `[chunks, B, Hk, G, chunk, block_m, ...]`, zeros at the end."""
        rows = self.chunks * self.chunk * self.block_m
        x = _pad(x, 3, rows)
        x = x.reshape(*x.shape[:3], self.chunks, self.chunk, self.block_m, *x.shape[4:])
        return jnp.moveaxis(x, 3, 0)

    def join_rows(self, x: Array) -> Array:
        """The inverse of `split_rows`."""
        x = jnp.moveaxis(x, 0, 3)
        return x.reshape(*x.shape[:3], -1, *x.shape[6:])[:, :, :, : self.q_len]

    def split_blocks(self, x: Array) -> Array:
        """`[B, Hk, G, Nq, ...]` to `[chunks, B, Hk, G, chunk, ...]`, zeros past the end."""
        x = _pad(x, 3, self.chunks * self.chunk)
        x = x.reshape(*x.shape[:3], self.chunks, self.chunk, *x.shape[4:])
        return jnp.moveaxis(x, 3, 0)

    def positions(self) -> Array:
        """Key position of every query, int32 `[chunks, chunk, block_m]`, for a causal mask."""
        rows = np.arange(self.chunks * self.chunk * self.block_m, dtype=np.int32)
        rows = rows.reshape(self.chunks, self.chunk, self.block_m)
        return jnp.asarray(rows + np.int32(self.kv_len - self.q_len))


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

    def first(self, rows: int, shape: "Shape") -> "Tile":
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
    entry = jnp.clip(of_level(entry_begin) + (within >> (3 - level)), 0, shape.n_k - 1)
    block = jnp.take_along_axis(table.entries, entry, -1, mode="promise_in_bounds")
    run_of_level = (block << (3 - level)) + (within & ((8 >> level) - 1))
    starts = [level_start(shape.kv_len, shape.block_n, x) // shape.run for x in LEVELS]
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
    tiles = -(-shape.most_rows // tile_rows)
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
    begin = jnp.minimum(begin, shape.n_k - 1)
    block = jnp.take_along_axis(table.entries, begin, -1, mode="promise_in_bounds")
    last_key = jnp.minimum(block * shape.block_n + np.array(LEVELS, np.int32), shape.kv_len) - 1
    last_key = jnp.where(table.counts > 0, last_key, jnp.iinfo(jnp.int32).max)
    return last_key.min(-1, keepdims=True) <= position


def logits(query: Array, keys: Array, tile: Tile, position: Array, shape: Shape) -> Array:
    """`[B, Hk, G, chunk, block_m, rows]`: scaled products plus bias, `hidden` where unseen.

    Args:
        query: `[B, Hk, G, chunk, block_m, D]`.
        keys: `[B, Hk, G, chunk, rows, D]`, of the tile.
        tile: what they are.
        position: int32 `[chunk, block_m]`, key position of each query.
        shape: the call.
    """
    s = product("bhgcmd,bhgctd->bhgcmt", query, keys) * shape.scale + tile.bias[..., None, :]
    if shape.is_causal:
        seen = tile.last_key[..., None, :] <= position[..., None]
        s = jnp.where(seen, s, hidden(s.dtype))
    return s


def product(pattern: str, a: Array, b: Array) -> Array:
    """Products of two input-dtype arrays summed in float32 (float64), never in tf32."""
    exact = jnp.dtype(a.dtype).itemsize >= 4
    return jnp.einsum(
        pattern,
        a,
        b,
        precision=lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT,
        preferred_element_type=accumulator(a.dtype),
    )


def as_runs(rows: Array, shape: Shape) -> Array:
    """Pyramid rows `[B, Hk, P, D]` as runs `[B, Hk, P // run, run * D]`."""
    return rows.reshape(*rows.shape[:2], shape.runs, shape.run * rows.shape[3])


def take_tile(runs: Array, tile: Tile, shape: Shape) -> Array:
    """Rows of a tile, `[B, Hk, G, chunk, rows, D]`, out of runs `[B, Hk, P // run, ...]`."""

    def take(of_head, index):
        return of_head.at[index].get(mode="promise_in_bounds")

    taken = jax.vmap(jax.vmap(take))(runs, _flat_runs(tile))
    return taken.reshape(*tile.bias.shape, runs.shape[3] // shape.run)


def add_tile(runs: Array, tile: Tile, rows: Array) -> Array:
    """`runs` with the rows `[B, Hk, G, chunk, rows, D]` of a tile added; takes' transpose."""

    def add(of_head, index, values):
        return of_head.at[index].add(values, mode="promise_in_bounds")

    index = _flat_runs(tile)
    return jax.vmap(jax.vmap(add))(runs, index, rows.reshape(*index.shape, -1))


def head_by_head(shape: Shape) -> bool:
    """Whether to loop over heads rather than take them all together.

    Apart, a head with a sparse mask does not wait for one with a dense mask, and its pyramid
    stays in the cache. Together, the heads of an array that is sharded over devices stay where
    they are; a loop over them would first bring every head to every device. Other devices than
    CPUs need the heads' parallelism as well.
    """
    if jax.default_backend() != "cpu" or shape.batch * shape.kv_heads == 1:
        return False
    return jax.device_count() == 1 or _inside_shard_map()


def filled_like(x: Array, value: float, dtype) -> Array:
    """An array of the shape of `x`, all `value`, for the start of a loop.

    It depends on `x` in name only, so that it is split over devices as `x` is, and inside
    `shard_map` is marked as differing between shards, as what the loop makes of it will be.
    """
    return jnp.where(False, x.astype(dtype), jnp.asarray(value, dtype))


def map_heads(one_head: Callable, shape: Shape, arrays: tuple) -> tuple[Array, ...]:
    """`one_head` over every batch entry and key head in turn: arrays `[B, Hk, ...]` in and out."""

    def of_rows(rows):
        # Each head is a row of a matrix: XLA copies arrays with axes of length 1 before it
        # loops over them.
        head = (row.reshape(1, 1, *x.shape[2:]) for row, x in zip(rows, arrays, strict=True))
        return one_head(*head)

    results = lax.map(of_rows, tuple(x.reshape(shape.batch * shape.kv_heads, -1) for x in arrays))
    return tuple(x.reshape(shape.batch, shape.kv_heads, *x.shape[3:]) for x in results)


def _inside_shard_map() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return bool(mesh.axis_names) and set(mesh.manual_axes) == set(mesh.axis_names)


def _flat_runs(tile: Tile) -> Array:
    return tile.runs.reshape(*tile.runs.shape[:2], math.prod(tile.runs.shape[2:]))


def _join_last(x: Array) -> Array:
    """The last two axes as one."""
    return x.reshape(*x.shape[:-2], -1)


def _pad(x: Array, axis: int, size: int) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)
