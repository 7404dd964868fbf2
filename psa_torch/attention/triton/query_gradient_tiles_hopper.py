"""How a multiplying warpgroup of `query_gradient_hopper` goes through its tiles, in two orders.

Both take three products a tile and give the same bits. In turn: the weights of a tile, then its
product with the keys. Beside: that product while the weights of the next tile are made, which keeps
the tensor cores busier where a product is long (head dimension 128) and is slower where it is not.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from psa_torch.attention.triton.products_hopper import start_with_tile
from psa_torch.attention.triton.softmax_hopper import operand
from psa_torch.attention.triton.walk import tail_rows


@gluon.jit
def _start_gradient(dq, ds, k_ring, t, SLOTS: gl.constexpr):
    """Starts dq + ds k of tile `t`, which is in place."""
    return warpgroup_mma(ds, k_ring.index(t % SLOTS), dq, is_async=True)


@gluon.jit
def _end_gradient(dq, ds, empty, t, outstanding: gl.constexpr, SLOTS: gl.constexpr):
    """What `_start_gradient` began, before `outstanding` later products; then the place of the
    tile is free."""
    dq, ds = warpgroup_mma_wait(outstanding, deps=[dq, ds])
    mbarrier.arrive(empty.index(t % SLOTS), count=1)
    return dq


@gluon.jit
def _gradient_of_logits(p, dp, delta, dtype: gl.constexpr, O_LAYOUT: gl.constexpr):
    """p * (dp - delta), an operand of the product with the keys."""
    return operand(p * (dp - gl.expand_dims(delta, 1)), dtype, gl.DotOperandLayout(0, O_LAYOUT, 2))


@gluon.jit
def _full_weights(s, slope, lse2, t, ends):
    """Weights of full tile `t` from its logits."""
    end0, end1, end2, end3 = ends
    g = (t >= end0).to(gl.int32) + (t >= end1).to(gl.int32) + (t >= end2).to(gl.int32)
    return gl.exp2(s * slope + gl.expand_dims(g.to(gl.float32) - lse2, 1))


@gluon.jit
def _tail_weights(
    s,
    slope,
    lse2,
    position,
    listed,
    lane,
    stream,
    padded_len,
    kv_len,
    LOG_BLOCK_N: gl.constexpr,
    IS_CAUSAL: gl.constexpr,
):
    """Weights of a tile of the tail from its logits; `lane` are its positions in the tail."""
    s_column: gl.constexpr = gl.SliceLayout(0, s.type.layout)
    n0, n1, n2, n3, done0, done1, done2, done3 = stream
    rows, last, bias = tail_rows(
        listed,
        lane,
        n0,
        n1,
        n2,
        n3,
        done0,
        done1,
        done2,
        done3,
        padded_len,
        kv_len,
        LOG_BLOCK_N,
    )
    s = s * slope + gl.expand_dims(gl.convert_layout(bias, s_column), 0)
    if IS_CAUSAL:
        last = gl.expand_dims(gl.convert_layout(last, s_column), 0)
        s = gl.where(last <= gl.expand_dims(position, 1), s, float("-inf"))
    return gl.exp2(s - gl.expand_dims(lse2, 1))


@gluon.jit
def gradient_in_turn(
    dq,
    q,
    dout,
    lse2,
    delta,
    position,
    slope,
    listed,
    lane,
    stream,
    ends,
    tiles,
    first,
    padded_len,
    kv_len,
    k_ring,
    v_ring,
    k_full,
    v_full,
    empty,
    LOG_BLOCK_N: gl.constexpr,
    SLOTS: gl.constexpr,
    IS_CAUSAL: gl.constexpr,
    S_LAYOUT: gl.constexpr,
):
    """dq of 64 query rows, before the factor `scale`, through every tile of a table row.

    Args:
        dq: zeros.
        lse2, delta, position: statistics of the rows, and where they stand among the keys.
        slope: factor on q.k in powers of 2.
        listed, stream: the table row: its block ids, and n0 to n3 and done0 to done3 of
            `walk.tail_rows`.
        lane: 0 to the rows of a tile, one a thread.
        ends: running ends of the full tiles of each level, of `tiles` in all.
        first: tiles that went through the rings before.
    """
    TILE: gl.constexpr = k_ring.shape[1]
    DTYPE: gl.constexpr = k_ring.dtype
    O_LAYOUT: gl.constexpr = dq.type.layout
    end0, end1, end2, end3 = ends
    for t in range(end3):
        x = first + t
        s = start_with_tile(q, k_ring, k_full, x, SLOTS, S_LAYOUT)
        dp = start_with_tile(dout, v_ring, v_full, x, SLOTS, S_LAYOUT)
        s = warpgroup_mma_wait(1, deps=[s])
        p = _full_weights(s, slope, lse2, t, ends)
        dp = warpgroup_mma_wait(0, deps=[dp])
        ds = _gradient_of_logits(p, dp, delta, DTYPE, O_LAYOUT)
        adding = _start_gradient(dq, ds, k_ring, x, SLOTS)
        dq = _end_gradient(adding, ds, empty, x, 0, SLOTS)

    for t in range(end3, tiles):
        x = first + t
        s = start_with_tile(q, k_ring, k_full, x, SLOTS, S_LAYOUT)
        s = warpgroup_mma_wait(0, deps=[s])
        p = _tail_weights(
            s,
            slope,
            lse2,
            position,
            listed,
            (t - end3) * TILE + lane,
            stream,
            padded_len,
            kv_len,
            LOG_BLOCK_N,
            IS_CAUSAL,
        )
        # The mask took the registers that this product needs until here.
        dp = start_with_tile(dout, v_ring, v_full, x, SLOTS, S_LAYOUT)
        dp = warpgroup_mma_wait(0, deps=[dp])
        ds = _gradient_of_logits(p, dp, delta, DTYPE, O_LAYOUT)
        adding = _start_gradient(dq, ds, k_ring, x, SLOTS)
        dq = _end_gradient(adding, ds, empty, x, 0, SLOTS)
    return dq


@gluon.jit
def gradient_beside(
    dq,
    q,
    dout,
    lse2,
    delta,
    position,
    slope,
    listed,
    lane,
    stream,
    ends,
    tiles,
    first,
    padded_len,
    kv_len,
    k_ring,
    v_ring,
    k_full,
    v_full,
    empty,
    LOG_BLOCK_N: gl.constexpr,
    SLOTS: gl.constexpr,
    IS_CAUSAL: gl.constexpr,
    S_LAYOUT: gl.constexpr,
):
    """As `gradient_in_turn`. A tile keeps its place in the rings during the next one, so that
    these need two places at least."""
    TILE: gl.constexpr = k_ring.shape[1]
    DTYPE: gl.constexpr = k_ring.dtype
    O_LAYOUT: gl.constexpr = dq.type.layout
    end0, end1, end2, end3 = ends
    if tiles > 0:
        s = start_with_tile(q, k_ring, k_full, first, SLOTS, S_LAYOUT)
        s = warpgroup_mma_wait(0, deps=[s])
        if end3 > 0:
            p = _full_weights(s, slope, lse2, 0, ends)
        else:
            p = _tail_weights(
                s,
                slope,
                lse2,
                position,
                listed,
                lane,
                stream,
                padded_len,
                kv_len,
                LOG_BLOCK_N,
                IS_CAUSAL,
            )
        dp = start_with_tile(dout, v_ring, v_full, first, SLOTS, S_LAYOUT)
        dp = warpgroup_mma_wait(0, deps=[dp])
        ds = _gradient_of_logits(p, dp, delta, DTYPE, O_LAYOUT)

        for t in range(1, end3):
            x = first + t
            s = start_with_tile(q, k_ring, k_full, x, SLOTS, S_LAYOUT)
            dp = start_with_tile(dout, v_ring, v_full, x, SLOTS, S_LAYOUT)
            adding = _start_gradient(dq, ds, k_ring, x - 1, SLOTS)
            s = warpgroup_mma_wait(2, deps=[s])
            p = _full_weights(s, slope, lse2, t, ends)
            dp = warpgroup_mma_wait(1, deps=[dp])
            following = _gradient_of_logits(p, dp, delta, DTYPE, O_LAYOUT)
            dq = _end_gradient(adding, ds, empty, x - 1, 0, SLOTS)
            ds = following

        for t in range(gl.maximum(end3, 1), tiles):
            x = first + t
            s = start_with_tile(q, k_ring, k_full, x, SLOTS, S_LAYOUT)
            adding = _start_gradient(dq, ds, k_ring, x - 1, SLOTS)
            s = warpgroup_mma_wait(1, deps=[s])
            p = _tail_weights(
                s,
                slope,
                lse2,
                position,
                listed,
                (t - end3) * TILE + lane,
                stream,
                padded_len,
                kv_len,
                LOG_BLOCK_N,
                IS_CAUSAL,
            )
            # The mask took the registers that this product needs until here.
            dp = start_with_tile(dout, v_ring, v_full, x, SLOTS, S_LAYOUT)
            dq = _end_gradient(adding, ds, empty, x - 1, 1, SLOTS)
            dp = warpgroup_mma_wait(0, deps=[dp])
            ds = _gradient_of_logits(p, dp, delta, DTYPE, O_LAYOUT)

        last_tile = first + tiles - 1
        adding = _start_gradient(dq, ds, k_ring, last_tile, SLOTS)
        dq = _end_gradient(adding, ds, empty, last_tile, 0, SLOTS)
    return dq
