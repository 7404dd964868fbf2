"""Rows of a tile out of the pyramid, back into it, and their products with queries."""

import math

import jax
import jax.numpy as jnp
from jax import Array, lax

from psa_jax.attention.gather.shape import Shape
from psa_jax.attention.gather.visits import Tile, hidden
from psa_jax.pyramid import accumulator


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
    if tile.last_key is not None:
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


def _flat_runs(tile: Tile) -> Array:
    return tile.runs.reshape(*tile.runs.shape[:2], math.prod(tile.runs.shape[2:]))
