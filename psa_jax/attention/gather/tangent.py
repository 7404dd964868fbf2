"""Forward-mode derivatives of the visited rows."""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from psa_jax.attention.gather.heads import filled_like, head_by_head, map_heads
from psa_jax.attention.gather.products import as_runs, logits, product, take_tile
from psa_jax.attention.gather.shape import Shape
from psa_jax.attention.gather.visits import walk
from psa_jax.pyramid import accumulator, build_pyramid
from psa_jax.table import Table, build_table


class Moved(NamedTuple):
    """Sums over the rows that a query sees, with the weights P of the softmax over all of them.

    float32 (float64 for float64). Sums over parts of the rows add up, and `tangents` makes the
    derivatives of them.

    Attributes:
        lse: `[B, H, Lq]`, of P times the tangent of the logit.
        out: `[B, H, Lq, Dv]`, of P times (tangent of the logit times value + tangent of the value).
        mean: `[B, H, Lq, Dv]`, of P times the value: out itself, before it was rounded.
    """

    lse: Array
    out: Array
    mean: Array

    def tangents(self, dtype) -> tuple[Array, Array]:
        """The tangents of out, in its dtype, and of lse.

        d (P v) = P (ds - dlse) v + P dv, and dlse is the sum of P ds.
        """
        return (self.out - self.lse[..., None] * self.mean).astype(dtype), self.lse


def tangent(
    tq: Array,
    tk: Array,
    tv: Array,
    q: Array,
    k: Array,
    v: Array,
    levels: Array,
    lse: Array,
    *,
    block_m: int,
    block_n: int,
    scale: float,
    is_causal: bool,
) -> Moved:
    """How the sums behind out and lse move where q, k and v move by tq, tk and tv.

    Args:
        tq, tk, tv: in the shapes and dtypes of q, k and v.
        q, k, v, levels: the inputs of `forward`.
        lse: `[B, H, Lq]`, of the softmax that the weights are of.
    """
    shape = Shape.of(q, k, block_m=block_m, block_n=block_n, scale=scale, is_causal=is_causal)
    # A row that sees nothing has lse -inf; +inf makes all its weights 0.
    top = jnp.where(lse == -jnp.inf, jnp.inf, lse.astype(accumulator(q.dtype)))
    arrays: tuple = (*(shape.group_heads(x) for x in (q, tq, top, levels)), k, v, tk, tv)
    if head_by_head(shape):
        one = shape.one_head()
        moved = map_heads(functools.partial(_heads, shape=one), shape, arrays)
    else:
        moved = _heads(*arrays, shape=shape)
    of_lse, of_out, mean = moved
    values = (*q.shape[:3], v.shape[3])
    return Moved(of_lse.reshape(q.shape[:3]), of_out.reshape(values), mean.reshape(values))


def _heads(
    q: Array,
    tq: Array,
    lse: Array,
    levels: Array,
    k: Array,
    v: Array,
    tk: Array,
    tv: Array,
    shape: Shape,
) -> tuple[Array, Array, Array]:
    """The same for grouped q `[B, Hk, G, Lq, D]` and its kin, all heads at a time."""
    keys, values, t_keys, t_values = (
        as_runs(rows, shape)
        for pair in ((k, v), (tk, tv))
        for rows in build_pyramid(*pair, shape.block_n)
    )
    table = build_table(levels)
    dtype = accumulator(q.dtype)

    def chunk(of_chunk):
        query, t_query, top, entries, counts, position = of_chunk
        tiles = walk(Table(entries, counts), shape, dtype, shape.tile_rows)

        def add_tile(index, moved):
            tile = tiles.tile(index)
            key_rows, value_rows = take_tile(keys, tile, shape), take_tile(values, tile, shape)
            s = logits(query, key_rows, tile, position, shape)
            weights = jnp.exp(s - top[..., None])
            t_logits = product("bhgcmd,bhgctd->bhgcmt", t_query, key_rows)
            t_keys_rows = take_tile(t_keys, tile, shape)
            t_logits = t_logits + product("bhgcmd,bhgctd->bhgcmt", query, t_keys_rows)
            pushed = weights * (t_logits * shape.scale)

            def weighted(weights, rows):
                return product("bhgcmt,bhgctd->bhgcmd", weights.astype(rows.dtype), rows)

            of_lse, of_out, mean = moved
            t_value_rows = take_tile(t_values, tile, shape)
            return (
                of_lse + pushed.sum(-1),
                of_out + weighted(pushed, value_rows) + weighted(weights, t_value_rows),
                mean + weighted(weights, value_rows),
            )

        zero = filled_like(top, 0, dtype)
        rows = jnp.zeros(v.shape[3], dtype) + zero[..., None]
        return lax.fori_loop(0, tiles.used, add_tile, (zero, rows, rows))

    moved = lax.map(
        chunk,
        (
            *(shape.split_rows(x) for x in (q, tq, lse)),
            shape.split_blocks(table.entries),
            shape.split_blocks(table.counts),
            shape.positions(),
        ),
    )
    of_lse, of_out, mean = (shape.join_rows(x) for x in moved)
    return of_lse, of_out, mean
