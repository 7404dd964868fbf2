"""From a level mask to the arrays that the kernels walk: XLA operations of fixed capacity.

A row of the table is walked in three parts:
1. full tiles: `tile` rows of one level, from blocks that need no mask. The kernel finds their
   rows from `entries` by arithmetic; the bias is the level's log2, one scalar.
2. half tiles (level 8 of `block_n` 32 only): the same, with a fixed pattern of unused rows.
3. tail tiles: 8-row chunks of any level, listed here with what each row covers.
"""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from psa_jax.attention.mosaic.geometry import CHUNK, TiledGeometry
from psa_jax.table import build_table
from shared_specs.constants import LEVELS

MASKED = -1e30
"""Bias of a row that is not there: finite, so that no difference of two of them is NaN."""

SPANS = 16
"""int32 per row of `QueryPlan.spans`; named by the slices below."""
ENDS, FIRST, HALF, TAIL = slice(0, 4), slice(4, 8), 8, 9


class QueryPlan(NamedTuple):
    """The walk of every query block over the pyramid, `R = B * H * padded_q_blocks` rows.

    Attributes:
        entries: int32 `[R, Nk]`, the table of the specification, section 3.
        spans: int32 `[R, 16]`: running ends of the full tiles of each level (4), first entry of
            each level (4), number of half tiles, number of tail tiles.
        tail_start: int32 `[R, C]`, first pyramid row of each tail chunk.
        tail_covers: int32 `[R, C * 8 / tile, tile]`, the keys covered by each tail row, packed
            by `pack_covers`.
        half_covers: int32 `[1, 1, tile]`, the same for every half tile; None unless there are any.
    """

    entries: jax.Array
    spans: jax.Array
    tail_start: jax.Array
    tail_covers: jax.Array
    half_covers: jax.Array | None


def pack_covers(count, last):
    """Number of keys covered (0 to 8) and the last of them, in one int32."""
    return last * 16 + count


def read(ref, *index) -> jax.Array:
    """An integer of a plan, inside a kernel.

    Inside `jax.shard_map` the type of what is read says that it differs between shards, the type
    of what a kernel computes never does. A loop that begins at the former would be refused,
    because its counter changes type: adding 0 makes it the latter.
    """
    return ref[index] + 0


def unpack_covers(packed):
    """Inverse of `pack_covers`: (count, last)."""
    return packed & 15, packed >> 4


def pad_query_blocks(levels: jax.Array, geometry: TiledGeometry) -> jax.Array:
    """Levels with rows of level 0 up to a whole number of query tiles: the door of every plan.

    Args:
        levels: int32 `[B, H, Nq, Nk]` of this geometry.
    """
    chex.assert_shape(levels, (None, None, geometry.q_blocks, geometry.k_blocks))
    chex.assert_type(levels, jnp.int32)
    missing = geometry.padded_q_blocks - levels.shape[2]
    return jnp.pad(levels, [(0, 0), (0, 0), (0, missing), (0, 0)])


def query_plan(levels: jax.Array, geometry: TiledGeometry) -> QueryPlan:
    """Plan of the forward and dq kernels.

    Args:
        levels: int32 `[B, H, Nq, Nk]`, values in {0, 1, 2, 4, 8}.
    """
    levels = pad_query_blocks(levels, geometry)
    entries, counts = build_table(levels)
    seen, whole = (
        jnp.stack([x.sum(-1, dtype=jnp.int32) for x in of_levels], -1)
        for of_levels in zip(
            *(needed(levels, geometry, g) for g in range(len(LEVELS))), strict=True
        )
    )
    pitch, rows, start = (
        np.asarray(x, np.int32) for x in (geometry.pitch, geometry.rows, geometry.start)
    )
    tiles = whole * pitch // geometry.tile
    first = jnp.cumsum(counts, -1) - counts
    dense = np.isin(np.arange(len(LEVELS)), geometry.dense_levels)
    half = jnp.where(dense, 0, tiles).sum(-1)

    per_tile = geometry.chunks
    chunk_counts = seen * (pitch // CHUNK) - tiles * per_tile
    chunk_ends = jnp.cumsum(chunk_counts, -1)
    capacity = geometry.masked_chunk_capacity
    chunk = jnp.arange(capacity, dtype=jnp.int32)
    g = (chunk[:, None] >= chunk_ends[..., None, :]).sum(-1)
    present = g < len(LEVELS)
    g = jnp.minimum(g, len(LEVELS) - 1)

    def of_level(values):
        return jnp.take_along_axis(jnp.broadcast_to(values, counts.shape), g, -1)

    row = (chunk - of_level(chunk_ends - chunk_counts) + of_level(tiles * per_tile)) * CHUNK
    entry = of_level(first) + row // jnp.asarray(pitch)[g]
    inside = row % jnp.asarray(pitch)[g]
    block = jnp.take_along_axis(entries, jnp.where(present, entry, 0), -1)
    tail_start = jnp.asarray(start)[g] + block * jnp.asarray(pitch)[g] + inside

    lane = jnp.arange(CHUNK, dtype=jnp.int32)
    level = jnp.asarray(LEVELS, jnp.int32)[g][..., None]
    token = (block * jnp.asarray(rows)[g] + inside)[..., None] + lane
    covered = jnp.clip(geometry.kv_len - token * level, 0, level)
    real = present[..., None] & (inside[..., None] + lane < jnp.asarray(rows)[g][..., None])
    last = jnp.minimum((token + 1) * level, geometry.kv_len) - 1
    covers = jnp.where(real, pack_covers(covered, last), 0)

    ends = jnp.cumsum(jnp.where(dense, tiles, 0), -1)
    tails = -(-chunk_ends[..., -1:] // per_tile)
    spans = jnp.concatenate([ends, first, half[..., None], tails], -1).astype(jnp.int32)
    spans = jnp.pad(spans, [(0, 0)] * 3 + [(0, SPANS - spans.shape[-1])])
    return QueryPlan(
        entries=entries.reshape(-1, geometry.k_blocks),
        spans=spans.reshape(-1, SPANS),
        tail_start=jnp.where(present, tail_start, 0).reshape(-1, capacity),
        tail_covers=covers.reshape(-1, capacity // per_tile, geometry.tile),
        half_covers=None if dense.all() else jnp.asarray(_half_covers(geometry)),
    )


def needed(levels: jax.Array, geometry: TiledGeometry, g: int) -> tuple[jax.Array, jax.Array]:
    """Which blocks at `LEVELS[g]` can be seen at all, and which need no mask: bool like `levels`.

    Both are prefixes of the level's entries, which ascend.
    """
    keys = jnp.arange(geometry.k_blocks) * geometry.block_n
    whole = keys + geometry.block_n <= geometry.kv_len
    seen = jnp.ones_like(whole)
    if geometry.is_causal:
        top = (jnp.arange(geometry.padded_q_blocks) * geometry.block_m + geometry.offset)[:, None]
        seen = keys <= top + geometry.block_m - 1
        whole = whole & (keys + geometry.block_n - 1 <= top)
    here = levels == LEVELS[g]
    return here & seen, here & whole


def _half_covers(geometry: TiledGeometry) -> np.ndarray:
    inside = np.arange(geometry.tile) % geometry.pitch[-1]
    count = np.where(inside < geometry.rows[-1], LEVELS[-1], 0)
    return pack_covers(count, 0).astype(np.int32)[None, None]
