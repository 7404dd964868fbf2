"""Softmax over the visited rows, in one pass or tile by tile (specification, section 4)."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from psa_jax.attention.gather.heads import filled_like, head_by_head, map_heads
from psa_jax.attention.gather.products import as_runs, logits, product, take_tile
from psa_jax.attention.gather.shape import ONE_PASS_BLOCKS, Shape
from psa_jax.attention.gather.visits import as_tile, hidden, sees_any, tiles_used, visit, walk
from psa_jax.pyramid import accumulator, build_pyramid
from psa_jax.table import Table, build_table


def forward(
    q: Array,
    k: Array,
    v: Array,
    levels: Array,
    *,
    block_m: int,
    block_n: int,
    scale: float,
    is_causal: bool,
) -> tuple[Array, Array]:
    """out `[B, H, Lq, Dv]` in the dtype of q and lse `[B, H, Lq]`, float32 (float64 for float64).

    Args:
        q: `[B, H, Lq, D]`.
        k, v: `[B, Hk, Lk, D]` and `[B, Hk, Lk, Dv]`.
        levels: int32 `[B, H, Nq, Nk]`.
    """
    shape = Shape.of(q, k, block_m=block_m, block_n=block_n, scale=scale, is_causal=is_causal)
    arrays = (shape.group_heads(q), k, v, shape.group_heads(levels))
    if head_by_head(shape):
        one = shape.one_head()
        out, lse = map_heads(functools.partial(_heads, shape=one), shape, arrays)
    else:
        out, lse = _heads(*arrays, shape=shape)
    return out.reshape(*q.shape[:3], v.shape[3]), lse.reshape(q.shape[:3])


def _heads(q: Array, k: Array, v: Array, levels: Array, shape: Shape) -> tuple[Array, Array]:
    """The same for grouped q `[B, Hk, G, Lq, D]` and levels, all heads at a time."""
    pyramid = build_pyramid(k, v, shape.block_n)
    keys, values = as_runs(pyramid.k, shape), as_runs(pyramid.v, shape)
    table = build_table(levels)
    dtype = accumulator(q.dtype)
    # One program for each number of rows up to some, and the loop where there are more. What the
    # programs read is listed for all chunks together: many small steps for each would cost more.
    rooms = shape.one_pass_rows
    listed = None
    if rooms:
        shape = dataclasses.replace(shape, cpu_blocks=ONE_PASS_BLOCKS)
        listed = as_tile(visit(table, shape, rooms[-1] // shape.run), shape, dtype)

    def chunk(of_chunk):
        query, entries, counts, position, most = of_chunk
        blocks = Table(entries, counts)

        def softmax(tile):
            """Sums of weighted values, their top logit and sums of weights, in one tile."""
            s = logits(query, take_tile(keys, tile, shape), tile, position, shape)
            top = s.max(-1)
            weights = jnp.exp(s - top[..., None])
            rows = take_tile(values, tile, shape)
            acc = product("bhgcmt,bhgctd->bhgcmd", weights.astype(rows.dtype), rows)
            return acc, top, weights.sum(-1)

        def at_once(rows):
            return softmax(most.first(rows, shape))

        def tile_by_tile():
            tiles = walk(blocks, shape, dtype, shape.loop_rows)

            def add_tile(index, carry):
                acc, top, total = carry
                # The tile has its own maximum, so that its logits and weights are one pass for
                # XLA; both sides are then brought to the common maximum.
                tile_acc, tile_top, tile_total = softmax(tiles.tile(index))
                new_top = jnp.maximum(top, tile_top)
                old, new = jnp.exp(top - new_top), jnp.exp(tile_top - new_top)
                acc = acc * old[..., None] + tile_acc * new[..., None]
                return acc, new_top, total * old + tile_total * new

            empty = (
                jnp.zeros(v.shape[3], dtype) + filled_like(query[..., :1], 0, dtype),
                filled_like(query[..., 0], hidden(dtype), dtype),
                filled_like(query[..., 0], 0, dtype),
            )
            return lax.fori_loop(0, tiles.used, add_tile, empty)

        if rooms:
            ways: list[Callable] = [functools.partial(at_once, rows) for rows in rooms]
            if rooms[-1] < shape.most_rows:
                ways.append(tile_by_tile)
            way = jnp.clip(tiles_used(counts, shape, rooms[0]) - 1, 0, len(ways) - 1)
            acc, top, total = lax.switch(way, ways)
        else:
            acc, top, total = tile_by_tile()

        # A block without rows went through no tile, or through one of hidden rows only; where
        # these were the largest, all logits of the row are below the range of the arithmetic.
        total = jnp.where(total == 0, 1, total)  # NaN, past that range, is not nothing
        seen = sees_any(blocks, position, shape) & (top != hidden(dtype))
        out = jnp.where(seen[..., None], acc / total[..., None], 0)
        return out.astype(query.dtype), jnp.where(seen, top + jnp.log(total), -jnp.inf)

    out, lse = lax.map(
        chunk,
        (
            shape.split_rows(q),
            shape.split_blocks(table.entries),
            shape.split_blocks(table.counts),
            shape.positions(),
            jax.tree.map(shape.split_blocks, listed),
        ),
    )
    return shape.join_rows(out), shape.join_rows(lse)
