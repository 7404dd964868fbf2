"""What a tile of queries adds to the gradients of a tile of pyramid rows."""

from typing import NamedTuple

import triton
import triton.language as tl

from psa_torch._triton.constants import LOG2E
from psa_torch.attention.triton.columns import in_columns


class QueryTile(NamedTuple):
    """Some query rows of one head.

    Attributes:
        q, dout: their tiles.
        lse2, delta: pointers to the statistics of the head.
        first: number of the first row.
    """

    q: object
    dout: object
    lse2: object
    delta: object
    first: object


@triton.jit
def load_queries(
    q_base,
    dout_base,
    first,
    q_len,
    Q_STRIDE_M: tl.constexpr,
    DOUT_STRIDE_M: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
):
    """`ROWS` rows of q and dout of one head from row `first` on, zero past the last query and past
    the head dimensions D and DV."""
    m = tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)[None, :]
    e = tl.arange(0, V_WIDTH)[None, :]
    real = (first + m < q_len)[:, None]
    first64 = tl.cast(first, tl.int64)
    q = tl.load(
        q_base + first64 * Q_STRIDE_M + (m[:, None] * Q_STRIDE_M + d),
        mask=in_columns(real, d, D, WIDTH),
        other=0.0,
    )
    dout = tl.load(
        dout_base + first64 * DOUT_STRIDE_M + (m[:, None] * DOUT_STRIDE_M + e),
        mask=in_columns(real, e, DV, V_WIDTH),
        other=0.0,
    )
    return q, dout


@triton.jit
def add_products(
    k,
    v,
    dk,
    dv,
    queries,
    scale,
    last,
    offset,
    G: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
    MASKED: tl.constexpr,
):
    """dk and dv, `[keys, D]` (`[D, keys]` unless KEYS_FIRST), plus what a `QueryTile` owes.

    What is added is `2**G` times what one key is owed, dk before the factor `scale`: the weights
    of rows with full counts, a size that float16 can have.

    Args:
        last: last key that each row of k covers; `offset` is kv_len - q_len.
        MASKED: queries see only rows whose last key is not after their own position.
    """
    q, dout, lse2, delta, first = queries
    m = first + tl.arange(0, q.shape[0])
    shift = G - tl.load(lse2 + m)
    delta = tl.load(delta + m)
    if KEYS_FIRST:
        s = tl.dot(k, tl.trans(q), input_precision="ieee")
        s = s * (scale * LOG2E) + shift[None, :]
        if MASKED:
            s = tl.where(last[:, None] <= (m + offset)[None, :], s, float("-inf"))
        p = tl.math.exp2(s)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    else:
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        s = s * (scale * LOG2E) + shift[:, None]
        if MASKED:
            s = tl.where(last[None, :] <= (m + offset)[:, None], s, float("-inf"))
        p = tl.math.exp2(s)
        dv = tl.dot(tl.trans(dout), p.to(dout.dtype), dv, input_precision="ieee")
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dk = tl.dot(tl.trans(q), ds.to(q.dtype), dk, input_precision="ieee")
    return dk, dv


@triton.jit
def weights(k, v, queries, scale, last, offset, G: tl.constexpr, MASKED: tl.constexpr):
    """Weights and gradients of logits, `[keys, queries]` in the dtype of q, as in `add_products`.

    Both are made before either is used: where dk and dv start from zero, their accumulators need
    not stand beside the float32 form of these.
    """
    q, dout, lse2, delta, first = queries
    m = first + tl.arange(0, q.shape[0])
    s = tl.dot(k, tl.trans(q), input_precision="ieee")
    s = s * (scale * LOG2E) + (G - tl.load(lse2 + m))[None, :]
    if MASKED:
        s = tl.where(last[:, None] <= (m + offset)[None, :], s, float("-inf"))
    p = tl.math.exp2(s)
    dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
    ds = p * (dp - tl.load(delta + m)[None, :])
    return p.to(dout.dtype), ds.to(q.dtype)
