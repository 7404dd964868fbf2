"""The transposed walk: for every 64 pyramid rows, the query blocks that visit them.

A key tile is 64 rows of one level, so of up to 8 key blocks; a query block is listed once per
tile, with one bit for each of the tile's blocks that it visits at that level. Only the rows of
those blocks take part in the product's result. Tiles that end a level may run into the next one;
their surplus rows cover no key and are written to rows of the gradient that nothing reads.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from psa_jax.attention.mosaic.geometry import ROWS, TiledGeometry
from psa_jax.attention.mosaic.query_plan import pad_query_blocks
from shared_specs.constants import LEVELS
from shared_specs.geometry import cdiv

BLOCK_BITS = 8
"""Bits of a visit that say which blocks of the tile it is to."""

UNMASKED_BIT = 30
"""Bit of a visit that needs no causal mask, so that those that do are listed first."""

VISITS, MASKED_VISITS = 0, 1
"""Columns of `KeyPlan.counts`."""


class KeyPlan(NamedTuple):
    """The walk of every key tile over the query blocks.

    Attributes:
        visits: int32 `[B * Hk * tiles, H / Hk * padded_q_blocks]`, see `visited_query`; those that
            need a causal mask first, then by query head and block.
        counts: int32 `[B * Hk * tiles, 2]`: visits, and how many of them need a causal mask.
        starts: int32 `[tiles]`, first pyramid row.
        rows: int32 `[tiles, 64]`, what each row covers (`pack_row`).
    """

    visits: jax.Array
    counts: jax.Array
    starts: jax.Array
    rows: jax.Array


def pack_row(count, block, last):
    """Keys that a row covers (0 to 8), its block in the tile (0 to 7), its last key: one int32."""
    return last * 128 + block * 16 + count


def unpack_row(packed):
    """Inverse of `pack_row`: (count, block, last)."""
    return packed & 15, (packed >> 4) & 7, packed >> 7


@dataclasses.dataclass(frozen=True)
class KeyTiles:
    """Static facts of the key tiles of a geometry.

    Attributes:
        levels: indices of the levels that have tiles, ascending.
    """

    geometry: TiledGeometry
    levels: tuple[int, ...]

    def count(self, g: int) -> int:
        """Tiles of a level."""
        return cdiv(self.geometry.k_blocks * self.geometry.pitch[g], ROWS)

    @functools.cached_property
    def first(self) -> dict[int, int]:
        """First tile, by level."""
        return {g: sum(map(self.count, self.levels[:i])) for i, g in enumerate(self.levels)}

    @property
    def total(self) -> int:
        return sum(map(self.count, self.levels))

    def block_rows(self, g: int) -> int:
        """Rows of one block inside one tile."""
        return min(self.geometry.pitch[g], ROWS)

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`KeyPlan.starts`, `KeyPlan.rows`, and the last key of each tile."""
        geometry = self.geometry
        starts, rows, last_keys = [], [], []
        for g in self.levels:
            level = LEVELS[g]
            row = np.arange(self.count(g) * ROWS).reshape(-1, ROWS)
            block, inside = np.divmod(row, geometry.pitch[g])
            token = block * geometry.rows[g] + inside
            real = (inside < geometry.rows[g]) & (block < geometry.k_blocks)
            count = np.where(real, np.clip(geometry.kv_len - token * level, 0, level), 0)
            last = np.where(count > 0, np.minimum((token + 1) * level, geometry.kv_len) - 1, 0)
            rows.append(pack_row(count, np.arange(ROWS) // self.block_rows(g), last))
            starts.append(geometry.start[g] + row[:, 0])
            last_keys.append(last.max(-1))
        starts, rows, last_keys = (np.concatenate(x) for x in (starts, rows, last_keys))
        return starts.astype(np.int32), rows.astype(np.int32), last_keys


def key_plan(levels: jax.Array, kv_heads: int, key_tiles: KeyTiles) -> KeyPlan:
    """Plan of the dk and dv kernel.

    Args:
        levels: int32 `[B, H, Nq, Nk]`, values in {0, 1, 2, 4, 8}.
    """
    geometry = key_tiles.geometry
    starts, rows, last_key = key_tiles.arrays()
    levels = jnp.swapaxes(pad_query_blocks(levels, geometry), -1, -2)
    query_block = jnp.arange(geometry.padded_q_blocks, dtype=jnp.int32)
    if geometry.is_causal:
        first_key = (jnp.arange(geometry.k_blocks) * geometry.block_n)[:, None]
        last_query = (query_block + 1) * geometry.block_m - 1 + geometry.offset
        levels = jnp.where(first_key <= last_query, levels, 0)
    bits = jnp.concatenate([_bits(levels, key_tiles, g) for g in key_tiles.levels], axis=2)
    masked = jnp.zeros((), bool)
    if geometry.is_causal:
        first_query = query_block * geometry.block_m + geometry.offset
        masked = first_query < jnp.asarray(last_key)[:, None]
    # One list for all query heads that share the key/value head.
    group = levels.shape[1] // kv_heads
    bits, masked = (
        jnp.broadcast_to(x, bits.shape)
        .reshape(-1, group, key_tiles.total, geometry.padded_q_blocks)
        .swapaxes(1, 2)
        .reshape(-1, group * geometry.padded_q_blocks)
        for x in (bits, masked)
    )
    visited = bits > 0
    query = jnp.arange(bits.shape[-1], dtype=jnp.int32)
    visits = query << BLOCK_BITS | bits | jnp.where(masked, 0, 1 << UNMASKED_BIT)
    visits = jnp.sort(jnp.where(visited, visits, np.iinfo(np.int32).max), axis=-1, stable=False)
    counts = [x.sum(-1, dtype=jnp.int32) for x in (visited, visited & masked)]
    return KeyPlan(
        visits=visits,
        counts=jnp.stack(counts, -1),
        starts=jnp.asarray(starts),
        rows=jnp.asarray(rows),
    )


def visited_query(visit):
    """Which query block a visit comes from: query head of the group * query blocks + block."""
    return (visit & ~(1 << UNMASKED_BIT)) >> BLOCK_BITS


def _bits(levels: jax.Array, key_tiles: KeyTiles, g: int) -> jax.Array:
    """`[B, H, tiles of the level, Nq]`: which blocks of each tile each query block visits."""
    geometry = key_tiles.geometry
    here = (levels == LEVELS[g]).astype(jnp.int32)
    here = jnp.repeat(here, geometry.pitch[g] // key_tiles.block_rows(g), axis=2)
    blocks = ROWS // key_tiles.block_rows(g)
    missing = key_tiles.count(g) * blocks - here.shape[2]
    here = jnp.pad(here, [(0, 0), (0, 0), (0, missing), (0, 0)])
    here = here.reshape(*here.shape[:2], -1, blocks, here.shape[-1])
    place = jnp.left_shift(1, jnp.arange(blocks, dtype=jnp.int32))[:, None]
    return (here * place).sum(3, dtype=jnp.int32)


def rows_of_level(rows: jax.Array, key_tiles: KeyTiles, g: int) -> jax.Array:
    """A level's part `[B * Hk, Nk * pitch, D]` of rows laid out tile by tile."""
    start = key_tiles.first[g] * ROWS
    return rows[:, start : start + key_tiles.geometry.k_blocks * key_tiles.geometry.pitch[g]]
