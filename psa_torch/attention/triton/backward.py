"""Backward of pyramid sparse attention: dq over the table, dk and dv over the transposed one.

Every row of dq, dk and dv has one writer that adds in a fixed order, so the result is the same
bit for bit from run to run. Un-pooling is fused: the log2 of the count in a logit cancels the
1/count of the mean, so what a pooled row owes to each key it covers is its plain sum over
queries; every level adds to its own sum what the level above owes and passes that down, and
level 1 writes the gradients.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from psa_torch.attention.triton import configs
from psa_torch.attention.triton.configs import BackwardConfig, KeyGradConfig, QueryGradConfig
from psa_torch.attention.triton.plan import Plan, key_plans, query_plan
from psa_torch.attention.triton.walk import (
    gather_rows,
    in_full_tiles,
    level_start,
    load4,
    select4,
    tail_length,
    tail_rows,
)
from psa_torch.kernels._launch import on_device_of
from psa_torch.pyramid import Pyramid, build_pyramid
from shared_specs.constants import LEVELS
from shared_specs.pyramid import padded_length

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def row_statistics(
    out_pointer,
    dout_pointer,
    lse_pointer,
    dlse_pointer,
    delta_pointer,
    lse2_pointer,
    out_stride_b,
    out_stride_h,
    out_stride_m,
    dout_stride_b,
    dout_stride_h,
    dout_stride_m,
    heads,
    q_len,
    padded_q_len,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_DLSE: tl.constexpr,
):
    """delta = rowsum(dout * out) - dlse, and lse in base 2: what both gradient kernels subtract.

    Rows that see nothing or do not exist get lse2 = +inf, so that their weights are exactly 0.
    """
    batch_head = tl.program_id(1)
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, D)
    real = m < q_len
    m64 = m.to(tl.int64)[:, None]
    out_pointer += batch * out_stride_b + head * out_stride_h
    dout_pointer += batch * dout_stride_b + head * dout_stride_h
    out = tl.load(out_pointer + m64 * out_stride_m + d[None, :], mask=real[:, None], other=0.0)
    dout = tl.load(dout_pointer + m64 * dout_stride_m + d[None, :], mask=real[:, None], other=0.0)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    row = batch_head.to(tl.int64) * q_len + m
    lse = tl.load(lse_pointer + row, mask=real, other=float("-inf"))
    seen = lse > float("-inf")
    if HAS_DLSE:
        delta -= tl.load(dlse_pointer + row, mask=real, other=0.0)
    padded_row = batch_head.to(tl.int64) * padded_q_len + m
    inside = m < padded_q_len
    tl.store(delta_pointer + padded_row, tl.where(seen, delta, 0.0), mask=inside)
    tl.store(lse2_pointer + padded_row, tl.where(seen, lse * LOG2E, float("inf")), mask=inside)


@triton.jit
def query_gradient(
    q_pointer,
    k_pointer,
    v_pointer,
    dout_pointer,
    lse2_pointer,
    delta_pointer,
    entries,
    counts,
    full_counts,
    dq_pointer,
    q_stride_b,
    q_stride_h,
    q_stride_m,
    dout_stride_b,
    dout_stride_h,
    dout_stride_m,
    scale,
    heads,
    group,
    q_len,
    kv_len,
    padded_len,
    q_blocks,
    k_blocks,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LOG_BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    TAIL: tl.constexpr,
    STAGES: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
):
    """dq of `ROWS` query rows of one head, over the tiles that the forward visited."""
    part = tl.num_programs(0) - 1 - tl.program_id(0) if IS_CAUSAL else tl.program_id(0)
    batch_head = tl.program_id(1)
    batch = batch_head // heads
    head = batch_head % heads
    kv_head = batch.to(tl.int64) * (heads // group) + head // group
    pyramid = kv_head * (2 * padded_len - padded_len // 8) * D
    k_pointer += pyramid
    v_pointer += pyramid

    m = part * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, D)
    m64 = m.to(tl.int64)[:, None]
    real_row = m[:, None] < q_len
    q_pointer += batch.to(tl.int64) * q_stride_b + head.to(tl.int64) * q_stride_h
    dout_pointer += batch.to(tl.int64) * dout_stride_b + head.to(tl.int64) * dout_stride_h
    q = tl.load(q_pointer + m64 * q_stride_m + d[None, :], mask=real_row, other=0.0)
    dout = tl.load(dout_pointer + m64 * dout_stride_m + d[None, :], mask=real_row, other=0.0)
    padded_row = batch_head.to(tl.int64) * (q_blocks * BLOCK_M) + m
    lse2 = tl.load(lse2_pointer + padded_row)
    delta = tl.load(delta_pointer + padded_row)

    table_row = batch_head * q_blocks + part * ROWS // BLOCK_M
    n0, n1, n2, n3 = load4(counts, table_row)
    u0, u1, u2, u3 = load4(full_counts, table_row)
    entries += table_row.to(tl.int64) * k_blocks
    dq = tl.zeros([ROWS, D], tl.float32)

    done0 = in_full_tiles(u0, 0, LOG_BLOCK_N, TILE)
    done1 = in_full_tiles(u1, 1, LOG_BLOCK_N, TILE)
    done2 = in_full_tiles(u2, 2, LOG_BLOCK_N, TILE)
    done3 = in_full_tiles(u3, 3, LOG_BLOCK_N, TILE)
    end0 = done0 // TILE
    end1 = end0 + done1 // TILE
    end2 = end1 + done2 // TILE
    end3 = end2 + done3 // TILE
    for t in tl.range(0, end3, num_stages=STAGES):
        g = (t >= end0).to(tl.int32) + (t >= end1).to(tl.int32) + (t >= end2).to(tl.int32)
        level_entry = select4(g, 0, n0, n0 + n1, n0 + n1 + n2)
        position = (t - select4(g, 0, end0, end1, end2)) * TILE + tl.arange(0, TILE)
        rows = gather_rows(entries, level_entry, position, g, padded_len, LOG_BLOCK_N)
        at = rows[:, None] * D + d[None, :]
        k = tl.load(k_pointer + at)
        v = tl.load(v_pointer + at)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        p = tl.math.exp2(s * (scale * LOG2E) + (g.to(tl.float32) - lse2)[:, None])
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")

    left = tail_length(n0, n1, n2, n3, done0, done1, done2, done3, LOG_BLOCK_N)
    for first in tl.range(0, left, TAIL, num_stages=1):
        rows, last, bias = tail_rows(
            entries,
            first + tl.arange(0, TAIL),
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
        real = (bias > float("-inf"))[:, None]
        at = rows[:, None] * D + d[None, :]
        k = tl.load(k_pointer + at, mask=real, other=0.0)
        v = tl.load(v_pointer + at, mask=real, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E) + bias[None, :]
        if IS_CAUSAL:
            s = tl.where(last[None, :] <= m[:, None] + (kv_len - q_len), s, float("-inf"))
        p = tl.math.exp2(s - lse2[:, None])
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")

    dq_row = batch_head.to(tl.int64) * q_len + m
    tl.store(
        dq_pointer + dq_row[:, None] * D + d[None, :],
        (dq * scale).to(dq_pointer.dtype.element_ty),
        mask=real_row,
    )


@triton.jit
def _add_queries(
    k,
    v,
    dk,
    dv,
    q_base,
    dout_base,
    lse2_base,
    delta_base,
    first,
    scale,
    last,
    seen,
    q_len,
    kv_len,
    Q_STRIDE_M: tl.constexpr,
    DOUT_STRIDE_M: tl.constexpr,
    G: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
    SHARED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds to dk and dv what `ROWS` queries from row `first` on contribute.

    SHARED: only the keys that are `seen`; MASKED: only those that causality leaves visible.
    """
    m = tl.arange(0, ROWS)
    d = tl.arange(0, D)
    real = (first + m < q_len)[:, None]
    first64 = tl.cast(first, tl.int64)
    q = tl.load(
        q_base + first64 * Q_STRIDE_M + (m[:, None] * Q_STRIDE_M + d[None, :]), mask=real, other=0.0
    )
    dout = tl.load(
        dout_base + first64 * DOUT_STRIDE_M + (m[:, None] * DOUT_STRIDE_M + d[None, :]),
        mask=real,
        other=0.0,
    )
    shift = G - tl.load(lse2_base + first + m)
    delta = tl.load(delta_base + first + m)
    position = first + m + (kv_len - q_len)
    if KEYS_FIRST:
        s = tl.dot(k, tl.trans(q), input_precision="ieee")
        s = s * (scale * LOG2E) + shift[None, :]
        if SHARED:
            s = tl.where(seen[:, None], s, float("-inf"))
        if MASKED:
            s = tl.where(last[:, None] <= position[None, :], s, float("-inf"))
        p = tl.math.exp2(s)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    else:
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        s = s * (scale * LOG2E) + shift[:, None]
        if SHARED:
            s = tl.where(seen[None, :], s, float("-inf"))
        if MASKED:
            s = tl.where(last[None, :] <= position[:, None], s, float("-inf"))
        p = tl.math.exp2(s)
        dv = tl.dot(tl.trans(dout), p.to(dout.dtype), dv, input_precision="ieee")
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dk = tl.dot(tl.trans(q), ds.to(q.dtype), dk, input_precision="ieee")
    return dk, dv


@triton.jit
def key_gradient(
    q_pointer,
    k_pointer,
    v_pointer,
    dout_pointer,
    lse2_pointer,
    delta_pointer,
    entries,
    counts,
    full_counts,
    levels,
    dk_pooled,
    dv_pooled,
    dk_pointer,
    dv_pointer,
    q_stride_b,
    q_stride_h,
    dout_stride_b,
    dout_stride_h,
    scale,
    kv_heads,
    group,
    q_len,
    kv_len,
    padded_len,
    q_blocks,
    k_blocks,
    lists,
    Q_STRIDE_M: tl.constexpr,
    DOUT_STRIDE_M: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LOG_BLOCK_N: tl.constexpr,
    G: tl.constexpr,
    OWN: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
):
    """Gradients of `OWN` pyramid rows of level `2**G`, from all heads of their group.

    The rows are part of one key block, or several adjacent blocks that share one of the `lists`
    walks of each head; `levels` `[B, H, Nq, Nk]` then says which of them a query block sees.
    dk_pooled, dv_pooled: float32 `[B, Hk, P - Lk', D]`, what each pooled row owes to every key
    that it covers (dk before the factor `scale`), coarser levels included.
    Level 1 writes dk, dv `[B, Hk, Lk, D]` instead.
    The row strides are compile-time constants because the loop has no registers to spare.
    """
    RUN: tl.constexpr = (1 << LOG_BLOCK_N) >> G
    SHARED: tl.constexpr = OWN > RUN
    # Tensor-core products have at least 16 columns: fewer rows repeat their last one.
    KEYS: tl.constexpr = OWN if OWN > 16 else 16
    # The keys are the tall side of the products where they can be (64 rows on Hopper).
    KEYS_FIRST: tl.constexpr = OWN >= 64
    walk = tl.program_id(0) if SHARED else tl.program_id(0) // (RUN // OWN)
    batch_kv_head = tl.program_id(1)
    batch = batch_kv_head // kv_heads
    kv_head = batch_kv_head % kv_heads
    lane = tl.arange(0, KEYS)
    run = tl.program_id(0) * OWN + lane
    real = (lane < OWN) & (run < padded_len >> G)
    run = tl.minimum(run, (padded_len >> G) - 1)
    d = tl.arange(0, D)
    rows = level_start(padded_len, G) + run
    pyramid = batch_kv_head.to(tl.int64) * (2 * padded_len - padded_len // 8) * D
    k = tl.load(k_pointer + pyramid + (rows[:, None] * D + d[None, :]))
    v = tl.load(v_pointer + pyramid + (rows[:, None] * D + d[None, :]))
    last = tl.minimum((run + 1) << G, kv_len) - 1
    pooled = batch_kv_head.to(tl.int64) * (padded_len - padded_len // 8) * D
    dk_pooled += pooled
    dv_pooled += pooled
    key_block = run // RUN
    if KEYS_FIRST:
        column = d[None, :]
        run = run[:, None]
        live = real[:, None]
    else:
        column = d[:, None]
        run = run[None, :]
        live = real[None, :]
    # The exponent below carries +G, for the range of float16, so sums are 2**G times what a
    # key is owed. They start from what the level above owes, before the loop needs registers.
    if G < 3:
        above = (level_start(padded_len, G + 1) - padded_len + (run >> 1)) * D + column
        dk = tl.load(dk_pooled + above) * (1 << G)
        dv = tl.load(dv_pooled + above) * (1 << G)
    elif KEYS_FIRST:
        dk = tl.zeros([KEYS, D], tl.float32)
        dv = tl.zeros([KEYS, D], tl.float32)
    else:
        dk = tl.zeros([D, KEYS], tl.float32)
        dv = tl.zeros([D, KEYS], tl.float32)

    PARTS: tl.constexpr = BLOCK_M // ROWS
    for member in tl.range(0, group, num_stages=1):
        head = kv_head * group + member
        batch_head = batch_kv_head * group + member
        list_row = batch_head * lists + walk
        n0, n1, n2, n3 = load4(counts, list_row)
        listed = entries + list_row.to(tl.int64) * q_blocks
        full = full_counts + list_row.to(tl.int64) * 4
        if SHARED:
            count = n0
        else:
            listed += select4(G, 0, n0, n0 + n1, n0 + n1 + n2)
            full += G
            count = select4(G, n0, n1, n2, n3)
        seen_at = levels + batch_head.to(tl.int64) * q_blocks * k_blocks + key_block
        q_base = q_pointer + batch.to(tl.int64) * q_stride_b + head.to(tl.int64) * q_stride_h
        dout_base = (
            dout_pointer + batch.to(tl.int64) * dout_stride_b + head.to(tl.int64) * dout_stride_h
        )
        statistics = batch_head.to(tl.int64) * (q_blocks * BLOCK_M)
        masked = 0
        if IS_CAUSAL:
            masked = count - tl.load(full)
        # The query blocks that straddle the diagonal come first in the list.
        for MASKED in tl.static_range(1 if IS_CAUSAL else 0, -1, -1):
            begin = 0 if MASKED else masked
            end = masked if MASKED else count
            for t in tl.range(begin * PARTS, end * PARTS, num_stages=STAGES):
                query_block = tl.load(listed + t // PARTS)
                first = query_block * BLOCK_M + t % PARTS * ROWS
                seen = lane >= 0
                if SHARED:
                    seen = tl.load(seen_at + query_block * k_blocks) == 1 << G
                dk, dv = _add_queries(
                    k,
                    v,
                    dk,
                    dv,
                    q_base,
                    dout_base,
                    lse2_pointer + statistics,
                    delta_pointer + statistics,
                    first,
                    scale,
                    last,
                    seen,
                    q_len,
                    kv_len,
                    Q_STRIDE_M,
                    DOUT_STRIDE_M,
                    G,
                    ROWS,
                    D,
                    KEYS_FIRST,
                    SHARED,
                    MASKED,
                )

    if G > 0:
        here = (level_start(padded_len, G) - padded_len + run) * D + column
        tl.store(dk_pooled + here, dk * (1.0 / (1 << G)), mask=live)
        tl.store(dv_pooled + here, dv * (1.0 / (1 << G)), mask=live)
    else:
        keys = batch_kv_head.to(tl.int64) * kv_len * D
        here = run * D + column
        live = live & (run < kv_len)
        tl.store(dk_pointer + keys + here, (dk * scale).to(dk_pointer.dtype.element_ty), mask=live)
        tl.store(dv_pointer + keys + here, dv.to(dv_pointer.dtype.element_ty), mask=live)


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    levels: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    block_m: int,
    block_n: int,
    scale: float,
    is_causal: bool,
    config: BackwardConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v at the given levels, the same bit for bit from run to run.

    Args:
        dout: `[B, H, Lq, D]`, gradient of `out`.
        dlse: float32 `[B, H, Lq]`, gradient of `lse`, or None for 0.
        q: `[B, H, Lq, D]`; k, v: `[B, Hk, Lk, D]`, float32, float16 or bfloat16.
        levels: int32 `[B, H, Nq, Nk]`.
        out, lse: what the forward returned.
        block_m, block_n: queries and keys per block.
        scale: factor on q.k, of any sign.
        is_causal: the last query sees the last key.
        config: tile sizes; None takes them from `configs`.

    Returns:
        dq, dk, dv in the shapes and dtypes of q, k and v. Contiguous.
    """
    geometry = dict(block_m=block_m, block_n=block_n, is_causal=is_causal)
    lengths = dict(q_len=q.shape[2], kv_len=k.shape[2])
    config = config or configs.backward_config(q, block_m, block_n)
    return backward_planned(
        dout,
        dlse,
        q,
        build_pyramid(k, v, block_n),
        levels,
        query_plan(levels, **lengths, **geometry),
        key_plans(levels, config.merged(block_n), **lengths, **geometry),
        out,
        lse,
        kv_len=k.shape[2],
        scale=scale,
        config=config,
        **geometry,
    )


def backward_planned(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    pyramid: Pyramid,
    levels: Tensor,
    by_query: Plan,
    by_key: tuple[Plan, Plan, Plan, Plan],
    out: Tensor,
    lse: Tensor,
    *,
    kv_len: int,
    block_m: int,
    block_n: int,
    scale: float,
    is_causal: bool,
    config: BackwardConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`backward` for a pyramid and plans that exist already; the part that benchmarks time.

    by_key: `key_plans(levels, config.merged(block_n), ...)`.
    """
    config = config or configs.backward_config(q, block_m, block_n)
    q, dout, out = (configs.rows_contiguous(x) for x in (q, dout.to(q.dtype), out))
    geometry = dict(kv_len=kv_len, block_m=block_m, block_n=block_n, is_causal=is_causal)
    with on_device_of(q):
        statistics = _row_statistics(out, dout, lse, dlse, block_m)
        dq = _query_gradient(
            q, pyramid, dout, statistics, by_query, scale=scale, config=config.query, **geometry
        )
        dk, dv = _key_gradients(
            q,
            pyramid,
            dout,
            statistics,
            levels.contiguous(),
            by_key,
            scale=scale,
            config=config.key,
            **geometry,
        )
    return dq, dk, dv


def _row_statistics(
    out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor | None, block_m: int
) -> tuple[Tensor, Tensor]:
    """delta and base-2 lse, float32 `[B, H, Nq * block_m]` each."""
    batch, heads, q_len, head_dim = out.shape
    rows = triton.cdiv(q_len, block_m) * block_m
    delta = lse.new_empty(batch, heads, rows, dtype=torch.float32)
    lse2 = torch.empty_like(delta)
    step = 32
    row_statistics[rows // step, batch * heads](
        out,
        dout,
        lse.contiguous(),
        None if dlse is None else dlse.contiguous(),
        delta,
        lse2,
        *out.stride()[:3],
        *dout.stride()[:3],
        heads,
        q_len,
        rows,
        D=head_dim,
        ROWS=step,
        HAS_DLSE=dlse is not None,
        num_warps=4,
    )
    return delta, lse2


def _query_gradient(
    q: Tensor,
    pyramid: Pyramid,
    dout: Tensor,
    statistics: tuple[Tensor, Tensor],
    plan: Plan,
    *,
    kv_len: int,
    block_m: int,
    block_n: int,
    scale: float,
    is_causal: bool,
    config: QueryGradConfig,
) -> Tensor:
    batch, heads, q_len, head_dim = q.shape
    delta, lse2 = statistics
    dq = q.new_empty(q.shape)
    query_gradient[triton.cdiv(q_len, config.rows), batch * heads](
        q,
        pyramid.k,
        pyramid.v,
        dout,
        lse2,
        delta,
        *plan,
        dq,
        *q.stride()[:3],
        *dout.stride()[:3],
        scale,
        heads,
        heads // pyramid.k.shape[1],
        q_len,
        kv_len,
        padded_length(kv_len, block_n),
        plan.entries.shape[2],
        plan.entries.shape[3],
        D=head_dim,
        BLOCK_M=block_m,
        LOG_BLOCK_N=block_n.bit_length() - 1,
        ROWS=config.rows,
        TILE=config.tile,
        TAIL=config.tail,
        STAGES=config.stages,
        IS_CAUSAL=is_causal,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return dq


def _key_gradients(
    q: Tensor,
    pyramid: Pyramid,
    dout: Tensor,
    statistics: tuple[Tensor, Tensor],
    levels: Tensor,
    plans: tuple[Plan, ...],
    *,
    kv_len: int,
    block_m: int,
    block_n: int,
    scale: float,
    is_causal: bool,
    config: tuple[KeyGradConfig, ...],
) -> tuple[Tensor, Tensor]:
    _, heads, q_len, head_dim = q.shape
    batch, kv_heads = pyramid.k.shape[:2]
    padded_len = padded_length(kv_len, block_n)
    delta, lse2 = statistics
    pooled = pyramid.k.new_empty(
        2, batch, kv_heads, padded_len - padded_len // 8, head_dim, dtype=torch.float32
    )
    dk = pyramid.k.new_empty(batch, kv_heads, kv_len, head_dim)
    dv = torch.empty_like(dk)
    # Coarsest first: each level adds what the level above owes to its rows.
    for g in reversed(range(len(LEVELS))):
        plan, keys = plans[g], config[g].keys
        key_gradient[triton.cdiv(padded_len >> g, keys), batch * kv_heads](
            q,
            pyramid.k,
            pyramid.v,
            dout,
            lse2,
            delta,
            *plan,
            levels,
            pooled[0],
            pooled[1],
            dk,
            dv,
            *q.stride()[:2],
            *dout.stride()[:2],
            scale,
            kv_heads,
            heads // kv_heads,
            q_len,
            kv_len,
            padded_len,
            levels.shape[2],
            levels.shape[3],
            plan.entries.shape[2],
            Q_STRIDE_M=q.stride(2),
            DOUT_STRIDE_M=dout.stride(2),
            D=head_dim,
            BLOCK_M=block_m,
            LOG_BLOCK_N=block_n.bit_length() - 1,
            G=g,
            OWN=keys,
            ROWS=config[g].rows,
            STAGES=config[g].stages,
            IS_CAUSAL=is_causal,
            num_warps=config[g].warps,
            num_stages=config[g].stages,
        )
    return dk, dv
