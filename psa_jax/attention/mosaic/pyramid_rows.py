"""Keys and values as the kernels read them: level 1 where it is, levels 2, 4 and 8 pooled.

Level 1 of a pyramid is a copy of the keys and values, more than half of its rows. The kernels read
it from the keys and values themselves. Rows are still numbered through all levels, as in one
pyramid (`TiledGeometry.start`); the number of a row says which of the two arrays holds it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from psa_jax.attention.mosaic.geometry import CHUNK, TiledGeometry


class PyramidRows(NamedTuple):
    """Keys or values at every level; arrays, and inside a kernel references.

    Attributes:
        tokens: `[B * Hk, Lk', D]`, level 1: the keys or values, and zeros past the last of them.
        pooled: `[B * Hk, pooled_rows, D]`, levels 2, 4 and 8, laid out as `TiledGeometry` says.
    """

    tokens: Any
    pooled: Any


def pooled_rows(rows: jax.Array, geometry: TiledGeometry) -> jax.Array:
    """What `pool_levels` makes, `[B, Hk, P, D]`, as the kernels' `[B * Hk, pooled_rows, D]`."""
    *lead, _, dim = rows.shape
    if geometry.rows != geometry.pitch:
        fine = geometry.start[-1] - geometry.first_pooled
        coarse = rows[..., fine:, :]
        coarse = coarse.reshape(*lead, geometry.k_blocks, geometry.rows[-1], dim)
        gap = geometry.pitch[-1] - geometry.rows[-1]
        coarse = jnp.pad(coarse, [(0, 0)] * (len(lead) + 1) + [(0, gap), (0, 0)])
        coarse = coarse.reshape(*lead, geometry.k_blocks * geometry.pitch[-1], dim)
        rows = jnp.concatenate([rows[..., :fine, :], coarse], axis=-2)
    return rows.reshape(-1, geometry.stored_rows, dim)


def copy_rows(
    source: PyramidRows,
    kv_head: jax.Array,
    start: jax.Array,
    count: int,
    target: Any,
    full: Any,
    *,
    geometry: TiledGeometry,
    level: int | None = None,
) -> None:
    """Start one copy of adjacent rows of a level to shared memory.

    Args:
        start: first pyramid row, a multiple of `CHUNK`.
        count: how many.
        target: where to, `[count, D]`.
        full: barrier at which the copy arrives.
        level: index of the level, if the same for all copies that this line makes; else `start`
            says which array to read.
    """

    def copy(ref, first):
        rows = pl.ds(pl.multiple_of(first, CHUNK), count)
        plgpu.copy_gmem_to_smem(ref.at[kv_head, rows], target, full)

    def copy_tokens():
        copy(source.tokens, start)

    def copy_pooled():
        copy(source.pooled, start - geometry.first_pooled)

    if level is None:
        pl.when(start < geometry.first_pooled)(copy_tokens)
        pl.when(start >= geometry.first_pooled)(copy_pooled)
    elif level == 0:
        copy_tokens()
    else:
        copy_pooled()
