"""Gradients of the visited rows, and from them of the keys they are means of."""

import functools

import jax.numpy as jnp
from jax import Array, lax

from psa_jax.attention.gather.heads import filled_like, head_by_head, map_heads
from psa_jax.attention.gather.products import add_tile, as_runs, logits, product, take_tile
from psa_jax.attention.gather.shape import Shape
from psa_jax.attention.gather.visits import walk
from psa_jax.pyramid import accumulator, build_pyramid, unpool
from psa_jax.table import Table, build_table


def backward(
    dout: Array,
    dlse: Array | None,
    q: Array,
    k: Array,
    v: Array,
    levels: Array,
    out: Array,
    lse: Array,
    *,
    block_m: int,
    block_n: int,
    scale: float,
    is_causal: bool,
) -> tuple[Array, Array, Array]:
    """dq, dk, dv in the dtypes and shapes of q, k, v.

    Args:
        dout: `[B, H, Lq, Dv]`, gradient of out.
        dlse: `[B, H, Lq]`, gradient of lse, or None for 0.
        q, k, v, levels: the inputs of `forward`.
        out, lse: its results.
    """
    shape = Shape.of(q, k, block_m=block_m, block_n=block_n, scale=scale, is_causal=is_causal)
    dtype = accumulator(q.dtype)
    # d logit = weight * (dout . v - (dout . out - dlse)): what is subtracted, and the lse, per
    # row. A row that saw nothing has lse -inf; +inf makes all its weights 0.
    empty = lse == -jnp.inf
    delta = (dout.astype(dtype) * out.astype(dtype)).sum(-1)
    if dlse is not None:
        delta = delta - jnp.where(empty, 0, dlse.astype(dtype))
    top = jnp.where(empty, jnp.inf, lse.astype(dtype))
    grouped = (shape.group_heads(x) for x in (q, dout.astype(q.dtype), top, delta, levels))
    arrays: tuple = (*grouped, k, v)
    if head_by_head(shape):
        one = shape.one_head()
        dq, dk, dv = map_heads(functools.partial(_heads, shape=one), shape, arrays)
    else:
        dq, dk, dv = _heads(*arrays, shape=shape)
    return dq.reshape(q.shape), dk, dv


def _heads(
    q: Array,
    dout: Array,
    lse: Array,
    delta: Array,
    levels: Array,
    k: Array,
    v: Array,
    shape: Shape,
) -> tuple[Array, Array, Array]:
    """The same for grouped q `[B, Hk, G, Lq, D]` and its kin, all heads at a time."""
    pyramid = build_pyramid(k, v, shape.block_n)
    keys, values = as_runs(pyramid.k, shape), as_runs(pyramid.v, shape)
    table = build_table(levels)
    dtype = accumulator(q.dtype)

    def chunk(carry, of_chunk):
        query, grad, top, delta, entries, counts, position = of_chunk
        tiles = walk(Table(entries, counts), shape, dtype, shape.tile_rows)

        def tile_gradients(index, carry):
            dq, dk_runs, dv_runs = carry
            tile = tiles.tile(index)
            key_rows = take_tile(keys, tile, shape)
            value_rows = take_tile(values, tile, shape)
            s = logits(query, key_rows, tile, position, shape)
            weights = jnp.exp(s - top[..., None])
            d_weights = product("bhgcmd,bhgctd->bhgcmt", grad, value_rows)
            d_logits = (weights * (d_weights - delta[..., None])).astype(q.dtype)
            dq = dq + product("bhgcmt,bhgctd->bhgcmd", d_logits, key_rows)
            dk_rows = product("bhgcmt,bhgcmd->bhgctd", d_logits, query)
            dv_rows = product("bhgcmt,bhgcmd->bhgctd", weights.astype(q.dtype), grad)
            return (
                dq,
                add_tile(dk_runs, tile, dk_rows),
                add_tile(dv_runs, tile, dv_rows),
            )

        zero = filled_like(query, 0, dtype)
        dq, *d_runs = lax.fori_loop(0, tiles.used, tile_gradients, (zero, *carry))
        return tuple(d_runs), (dq * shape.scale).astype(q.dtype)

    zeros = tuple(filled_like(x, 0, dtype) for x in (keys, values))
    (dk_runs, dv_runs), dq = lax.scan(
        chunk,
        zeros,
        (
            *(shape.split_rows(x) for x in (q, dout, lse, delta)),
            shape.split_blocks(table.entries),
            shape.split_blocks(table.counts),
            shape.positions(),
        ),
    )
    dk, dv = (
        unpool(runs.reshape(*rows.shape), shape.kv_len, shape.block_n)
        for runs, rows in zip((dk_runs * shape.scale, dv_runs), pyramid, strict=True)
    )
    return shape.join_rows(dq), dk.astype(k.dtype), dv.astype(v.dtype)
