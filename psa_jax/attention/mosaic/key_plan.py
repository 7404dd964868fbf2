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

from psa_jax.attention.mosaic.geometry import ROWS, Geometry, cdiv
from psa_jax.attention.mosaic.plan import pack_covers, pad_query_blocks
from shared_specs.constants import LEVELS

BLOCK_BITS = 8
"""Bits of a visit that say which blocks of the tile it is to; the rest is the query block."""

START, BLOCK_SHIFT = 0, 1
"""Columns of `KeyPlan.tiles`."""

VISITS, MASKED_VISITS = 0, 1
"""Columns of `KeyPlan.counts`."""


class KeyPlan(NamedTuple):
    """The walk of every key tile over the query blocks.

    Attributes:
        visits: int32 `[B * H * tiles, query_blocks]`: `query block << 8 | bits of key blocks`,
            ascending.
        counts: int32 `[B * H * tiles, 2]`: visits, and how many of them (the first) need a
            causal mask.
        tiles: int32 `[tiles, 2]`: first pyramid row, log2 of the rows of a block in the tile.
        covers: int32 `[tiles, 64]`, keys covered by each row (`plan.pack_covers`).
    """

    visits: jax.Array
    counts: jax.Array
    tiles: jax.Array
    covers: jax.Array


@dataclasses.dataclass(frozen=True)
class KeyTiles:
    """Static facts of the key tiles of a geometry."""

    geometry: Geometry

    @functools.cached_property
    def per_level(self) -> tuple[int, ...]:
        return tuple(cdiv(self.geometry.key_blocks * p, ROWS) for p in self.geometry.pitch)

    @functools.cached_property
    def first(self) -> tuple[int, ...]:
        """First tile, by level."""
        return tuple(sum(self.per_level[:g]) for g in range(len(LEVELS)))

    @property
    def total(self) -> int:
        return sum(self.per_level)

    def block_rows(self, g: int) -> int:
        """Rows of one block inside one tile."""
        return min(self.geometry.pitch[g], ROWS)

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`KeyPlan.tiles`, `KeyPlan.covers`, and the last key of each tile."""
        geometry = self.geometry
        tiles, covers = [], []
        for g, level in enumerate(LEVELS):
            row = np.arange(self.per_level[g] * ROWS).reshape(-1, ROWS)
            block, inside = np.divmod(row, geometry.pitch[g])
            token = block * geometry.rows[g] + inside
            count = np.clip(geometry.kv_len - token * level, 0, level)
            last = np.clip((token + 1) * level, 1, geometry.kv_len) - 1
            real = (inside < geometry.rows[g]) & (block < geometry.key_blocks)
            covers.append(np.where(real, pack_covers(count, last), 0))
            shift = np.full(len(row), np.log2(self.block_rows(g)))
            tiles.append(np.stack([geometry.start[g] + row[:, 0], shift], -1))
        covers = np.concatenate(covers).astype(np.int32)
        return np.concatenate(tiles).astype(np.int32), covers, (covers >> 4).max(-1)


def key_plan(levels: jax.Array, geometry: Geometry) -> KeyPlan:
    """Plan of the dk and dv kernel.

    Args:
        levels: int32 `[B, H, Nq, Nk]`, values in {0, 1, 2, 4, 8}.
    """
    key_tiles = KeyTiles(geometry)
    tiles, covers, last_key = key_tiles.arrays()
    levels = jnp.swapaxes(pad_query_blocks(levels, geometry), -1, -2)
    query_block = jnp.arange(geometry.query_blocks, dtype=jnp.int32)
    if geometry.is_causal:
        first_key = (jnp.arange(geometry.key_blocks) * geometry.block_n)[:, None]
        last_query = (query_block + 1) * geometry.block_m - 1 + geometry.offset
        levels = jnp.where(first_key <= last_query, levels, 0)
    bits = jnp.concatenate([_bits(levels, key_tiles, g) for g in range(len(LEVELS))], axis=2)
    visited = bits > 0
    none = np.iinfo(np.int32).max
    visits = jnp.sort(jnp.where(visited, query_block << BLOCK_BITS | bits, none), axis=-1)
    masked = jnp.zeros_like(visited)
    if geometry.is_causal:
        first_query = query_block * geometry.block_m + geometry.offset
        masked = visited & (first_query < jnp.asarray(last_key)[:, None])
    counts = jnp.stack([x.sum(-1, dtype=jnp.int32) for x in (visited, masked)], -1)
    return KeyPlan(
        visits=visits.reshape(-1, geometry.query_blocks),
        counts=counts.reshape(-1, 2),
        tiles=jnp.asarray(tiles),
        covers=jnp.asarray(covers),
    )


def _bits(levels: jax.Array, key_tiles: KeyTiles, g: int) -> jax.Array:
    """`[B, H, tiles of the level, Nq]`: which blocks of each tile each query block visits."""
    geometry = key_tiles.geometry
    here = (levels == LEVELS[g]).astype(jnp.int32)
    here = jnp.repeat(here, geometry.pitch[g] // key_tiles.block_rows(g), axis=2)
    blocks = ROWS // key_tiles.block_rows(g)
    missing = key_tiles.per_level[g] * blocks - here.shape[2]
    here = jnp.pad(here, [(0, 0), (0, 0), (0, missing), (0, 0)])
    here = here.reshape(*here.shape[:2], -1, blocks, here.shape[-1])
    place = jnp.left_shift(1, jnp.arange(blocks, dtype=jnp.int32))[:, None]
    return (here * place).sum(3, dtype=jnp.int32)


def unpool(rows: jax.Array, key_tiles: KeyTiles, shape: tuple[int, ...]) -> jax.Array:
    """Gradients of pyramid rows, `[B * Hk, tiles * 64, D]`, to those of keys of `shape`, float32."""
    geometry = key_tiles.geometry
    batch, heads, kv_len, dim = shape
    total = 0
    for g, level in enumerate(LEVELS):
        start, tokens = key_tiles.first[g] * ROWS, geometry.key_blocks * geometry.rows[g]
        share = rows[:, start : start + geometry.key_blocks * geometry.pitch[g]]
        share = share.reshape(batch, heads, geometry.key_blocks, geometry.pitch[g], dim)
        share = share[..., : geometry.rows[g], :].reshape(batch, heads, tokens, dim)
        count = np.clip(kv_len - np.arange(tokens) * level, 1, level).astype(np.float32)
        total = total + jnp.repeat(share / count[:, None], level, axis=2)
    return total[:, :, :kv_len]
