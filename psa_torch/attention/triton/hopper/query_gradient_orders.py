"""How a multiplying warpgroup of `query_gradient` goes through its tiles, in two orders.

Both take three products a tile and give the same bits. In turn: the weights of a tile, then its
product with the keys. Beside: that product while the weights of the next tile are made, which keeps
the tensor cores busier where a product is long (head dimension 128) and is slower where it is not.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    warpgroup_mma,
    warpgroup_mma_wait,
)

from psa_torch._triton.products import start_when_full
from psa_torch._triton.rings import release, tile_of
from psa_torch.attention.triton.hopper.softmax import operand
from psa_torch.attention.triton.walk import tail_rows


class QueryRows(NamedTuple):
    """What a multiplying warpgroup has of its 64 query rows.

    Attributes:
        q, dout: in shared memory.
        lse2, delta: statistics of the rows (see `row_statistics`).
        position: where they stand among the keys.
        slope: factor on q.k in powers of 2.
    """

    q: object
    dout: object
    lse2: object
    delta: object
    position: object
    slope: object


@gluon.jit
def _start_gradient(dq, ds, keys, t):
    """Starts dq + ds k of tile `t`, which is in place."""
    return warpgroup_mma(ds, tile_of(keys, t), dq, is_async=True)


@gluon.jit
def _end_gradient(dq, ds, keys, t, outstanding: gl.constexpr):
    """What `_start_gradient` began, before `outstanding` later products; then the place of the
    tile is free."""
    dq, ds = warpgroup_mma_wait(outstanding, deps=[dq, ds])
    release(keys, t)
    return dq


@gluon.jit
def _gradient_of_logits(p, dp, delta, dtype: gl.constexpr, O_LAYOUT: gl.constexpr):
    """p * (dp - delta), an operand of the product with the keys."""
    return operand(p * (dp - gl.expand_dims(delta, 1)), dtype, gl.DotOperandLayout(0, O_LAYOUT, 2))


@gluon.jit
def _full_weights(s, rows, t, ends):
    """Weights of full tile `t` from its logits."""
    end0, end1, end2, end3 = ends
    g = (t >= end0).to(gl.int32) + (t >= end1).to(gl.int32) + (t >= end2).to(gl.int32)
    return gl.exp2(s * rows.slope + gl.expand_dims(g.to(gl.float32) - rows.lse2, 1))


@gluon.jit
def _tail_weights(
    s, rows, listed, x, stream, sizes, LOG_BLOCK_N: gl.constexpr, IS_CAUSAL: gl.constexpr
):
    """Weights of a tile of the tail from its logits; `x` are its positions in the tail."""
    s_column: gl.constexpr = gl.SliceLayout(0, s.type.layout)
    places, last, bias = tail_rows(
        listed,
        x,
        stream.counts,
        stream.done,
        sizes.padded_len,
        sizes.kv_len,
        LOG_BLOCK_N,
    )
    s = s * rows.slope + gl.expand_dims(gl.convert_layout(bias, s_column), 0)
    if IS_CAUSAL:
        last = gl.expand_dims(gl.convert_layout(last, s_column), 0)
        s = gl.where(last <= gl.expand_dims(rows.position, 1), s, float("-inf"))
    return gl.exp2(s - gl.expand_dims(rows.lse2, 1))


@gluon.jit
def gradient_in_turn(
    dq,
    rows,
    listed,
    lane,
    stream,
    ends,
    tiles,
    sizes,
    first,
    rings,
    LOG_BLOCK_N: gl.constexpr,
    IS_CAUSAL: gl.constexpr,
):
    """dq of 64 query rows, before the factor `scale`, through every tile of a table row.

    Args:
        dq: zeros.
        rows: `QueryRows`.
        listed, stream: the table row: its block ids and its `RowStream`.
        ends, tiles: `walk.tile_ends` of it, and all its tiles.
        rings: of keys and of values.
        lane: 0 to the rows of a tile, one a thread.
        first: tiles that went through the rings before.
    """
    keys, values = rings
    TILE: gl.constexpr = keys.tiles.shape[1]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    DTYPE: gl.constexpr = keys.tiles.dtype
    O_LAYOUT: gl.constexpr = dq.type.layout
    end3 = ends[3]
    for t in range(end3):
        x = first + t
        s = start_when_full(rows.q, keys, x, S_LAYOUT)
        dp = start_when_full(rows.dout, values, x, S_LAYOUT)
        s = warpgroup_mma_wait(1, deps=[s])
        p = _full_weights(s, rows, t, ends)
        dp = warpgroup_mma_wait(0, deps=[dp])
        ds = _gradient_of_logits(p, dp, rows.delta, DTYPE, O_LAYOUT)
        adding = _start_gradient(dq, ds, keys, x)
        dq = _end_gradient(adding, ds, keys, x, 0)

    for t in range(end3, tiles):
        x = first + t
        s = start_when_full(rows.q, keys, x, S_LAYOUT)
        s = warpgroup_mma_wait(0, deps=[s])
        p = _tail_weights(
            s, rows, listed, (t - end3) * TILE + lane, stream, sizes, LOG_BLOCK_N, IS_CAUSAL
        )
        # The mask took the registers that this product needs until here.
        dp = start_when_full(rows.dout, values, x, S_LAYOUT)
        dp = warpgroup_mma_wait(0, deps=[dp])
        ds = _gradient_of_logits(p, dp, rows.delta, DTYPE, O_LAYOUT)
        adding = _start_gradient(dq, ds, keys, x)
        dq = _end_gradient(adding, ds, keys, x, 0)
    return dq


@gluon.jit
def gradient_beside(
    dq,
    rows,
    listed,
    lane,
    stream,
    ends,
    tiles,
    sizes,
    first,
    rings,
    LOG_BLOCK_N: gl.constexpr,
    IS_CAUSAL: gl.constexpr,
):
    """As `gradient_in_turn`. A tile keeps its place in the rings during the next one, so that
    these need two places at least."""
    keys, values = rings
    TILE: gl.constexpr = keys.tiles.shape[1]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    DTYPE: gl.constexpr = keys.tiles.dtype
    O_LAYOUT: gl.constexpr = dq.type.layout
    end3 = ends[3]
    if tiles > 0:
        s = start_when_full(rows.q, keys, first, S_LAYOUT)
        s = warpgroup_mma_wait(0, deps=[s])
        if end3 > 0:
            p = _full_weights(s, rows, 0, ends)
        else:
            p = _tail_weights(s, rows, listed, lane, stream, sizes, LOG_BLOCK_N, IS_CAUSAL)
        dp = start_when_full(rows.dout, values, first, S_LAYOUT)
        dp = warpgroup_mma_wait(0, deps=[dp])
        ds = _gradient_of_logits(p, dp, rows.delta, DTYPE, O_LAYOUT)

        for t in range(1, end3):
            x = first + t
            s = start_when_full(rows.q, keys, x, S_LAYOUT)
            dp = start_when_full(rows.dout, values, x, S_LAYOUT)
            adding = _start_gradient(dq, ds, keys, x - 1)
            s = warpgroup_mma_wait(2, deps=[s])
            p = _full_weights(s, rows, t, ends)
            dp = warpgroup_mma_wait(1, deps=[dp])
            following = _gradient_of_logits(p, dp, rows.delta, DTYPE, O_LAYOUT)
            dq = _end_gradient(adding, ds, keys, x - 1, 0)
            ds = following

        for t in range(gl.maximum(end3, 1), tiles):
            x = first + t
            s = start_when_full(rows.q, keys, x, S_LAYOUT)
            adding = _start_gradient(dq, ds, keys, x - 1)
            s = warpgroup_mma_wait(1, deps=[s])
            p = _tail_weights(
                s, rows, listed, (t - end3) * TILE + lane, stream, sizes, LOG_BLOCK_N, IS_CAUSAL
            )
            # The mask took the registers that this product needs until here.
            dp = start_when_full(rows.dout, values, x, S_LAYOUT)
            dq = _end_gradient(adding, ds, keys, x - 1, 1)
            dp = warpgroup_mma_wait(0, deps=[dp])
            ds = _gradient_of_logits(p, dp, rows.delta, DTYPE, O_LAYOUT)

        last_tile = first + tiles - 1
        adding = _start_gradient(dq, ds, keys, last_tile)
        dq = _end_gradient(adding, ds, keys, last_tile, 0)
    return dq
