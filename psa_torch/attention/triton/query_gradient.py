"""dq: one program per group of query rows, over the tiles that the forward visited."""

import triton
import triton.language as tl
from torch import Tensor

from psa_torch._triton.constants import LOG2E
from psa_torch._triton.launch import launch_kernel
from psa_torch.attention.triton.columns import in_columns, load_columns
from psa_torch.attention.triton.configs import HopperQueryGradConfig, QueryGradConfig, widths
from psa_torch.attention.triton.plan import Plan
from psa_torch.attention.triton.row_statistics import RowStatistics
from psa_torch.attention.triton.rows import Rows
from psa_torch.attention.triton.walk import (
    gather_rows,
    in_full_tiles,
    load4,
    select4,
    tail_length,
    tail_rows,
    tile_ends,
)
from shared_specs.geometry import Geometry, cdiv


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
    DV: tl.constexpr,
    WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LOG_BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    TAIL: tl.constexpr,
    STAGES: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
):
    """dq of `ROWS` query rows of one head, over the tiles that the forward visited.

    WIDTH, V_WIDTH: see `forward.attention_forward`.
    """
    part = tl.num_programs(0) - 1 - tl.program_id(0) if IS_CAUSAL else tl.program_id(0)
    batch_head = tl.program_id(1)
    batch = batch_head // heads
    head = batch_head % heads
    kv_head = batch.to(tl.int64) * (heads // group) + head // group
    pyramid = kv_head * (2 * padded_len - padded_len // 8)
    k_pointer += pyramid * D
    v_pointer += pyramid * DV

    m = part * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)[None, :]
    e = tl.arange(0, V_WIDTH)[None, :]
    m64 = m.to(tl.int64)[:, None]
    real_row = m[:, None] < q_len
    q_pointer += batch.to(tl.int64) * q_stride_b + head.to(tl.int64) * q_stride_h
    dout_pointer += batch.to(tl.int64) * dout_stride_b + head.to(tl.int64) * dout_stride_h
    real_q = in_columns(real_row, d, D, WIDTH)
    real_dout = in_columns(real_row, e, DV, V_WIDTH)
    q = tl.load(q_pointer + m64 * q_stride_m + d, mask=real_q, other=0.0)
    dout = tl.load(dout_pointer + m64 * dout_stride_m + e, mask=real_dout, other=0.0)
    padded_row = batch_head.to(tl.int64) * (q_blocks * BLOCK_M) + m
    lse2 = tl.load(lse2_pointer + padded_row)
    delta = tl.load(delta_pointer + padded_row)

    table_row = batch_head * q_blocks + part * ROWS // BLOCK_M
    n = load4(counts, table_row)
    u = load4(full_counts, table_row)
    n0, n1, n2, _ = n
    entries += table_row.to(tl.int64) * k_blocks
    dq = tl.zeros([ROWS, WIDTH], tl.float32)

    done = in_full_tiles(u, LOG_BLOCK_N, TILE)
    end0, end1, end2, end3 = tile_ends(done, TILE)
    for t in tl.range(0, end3, num_stages=STAGES):
        g = (t >= end0).to(tl.int32) + (t >= end1).to(tl.int32) + (t >= end2).to(tl.int32)
        level_entry = select4(g, 0, n0, n0 + n1, n0 + n1 + n2)
        position = (t - select4(g, 0, end0, end1, end2)) * TILE + tl.arange(0, TILE)
        rows = gather_rows(entries, level_entry, position, g, padded_len, LOG_BLOCK_N)
        k = load_columns(k_pointer + (rows[:, None] * D + d), d, D, WIDTH)
        v = load_columns(v_pointer + (rows[:, None] * DV + e), e, DV, V_WIDTH)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        p = tl.math.exp2(s * (scale * LOG2E) + (g.to(tl.float32) - lse2)[:, None])
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")

    left = tail_length(n, done, LOG_BLOCK_N)
    for first in tl.range(0, left, TAIL, num_stages=1):
        rows, last, bias = tail_rows(
            entries, first + tl.arange(0, TAIL), n, done, padded_len, kv_len, LOG_BLOCK_N
        )
        real = (bias > float("-inf"))[:, None]
        at = rows[:, None]
        k = tl.load(k_pointer + (at * D + d), mask=in_columns(real, d, D, WIDTH), other=0.0)
        v = tl.load(v_pointer + (at * DV + e), mask=in_columns(real, e, DV, V_WIDTH), other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E) + bias[None, :]
        if IS_CAUSAL:
            s = tl.where(last[None, :] <= m[:, None] + (kv_len - q_len), s, float("-inf"))
        p = tl.math.exp2(s - lse2[:, None])
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")

    dq_row = batch_head.to(tl.int64) * q_len + m
    tl.store(
        dq_pointer + dq_row[:, None] * D + d,
        (dq * scale).to(dq_pointer.dtype.element_ty),
        mask=real_q,
    )


def launch_query_gradient(
    q: Tensor,
    rows: Rows,
    dout: Tensor,
    statistics: RowStatistics,
    plan: Plan,
    geometry: Geometry,
    *,
    scale: float,
    config: QueryGradConfig | HopperQueryGradConfig,
) -> Tensor:
    """dq `[B, H, Lq, D]`; `plan` is the query plan of the level mask.

    Args:
        rows: for the plain kernel those of a pyramid in one place.
    """
    heads = q.shape[1]
    dq = q.new_empty(q.shape)
    arguments = (
        dout,
        statistics.lse2,
        statistics.delta,
        *plan,
        dq,
        *q.stride()[:3],
        *dout.stride()[:3],
        scale,
        heads,
        heads // rows.k.shape[1],
        geometry.q_len,
        geometry.kv_len,
        geometry.padded_len,
        plan.entries.shape[2],
        plan.entries.shape[3],
    )
    if isinstance(config, HopperQueryGradConfig):
        # Gluon kernels cannot be interpreted: nothing else may import them.
        from psa_torch.attention.triton.hopper import query_gradient as hopper_query_gradient

        launch = hopper_query_gradient.launch
    else:
        launch = _launch
    blocks = dict(block_m=geometry.block_m, block_n=geometry.block_n)
    launch(q, rows, arguments, config, **blocks, IS_CAUSAL=geometry.is_causal)
    return dq


def _launch(
    q: Tensor,
    rows: Rows,
    arguments: tuple,
    config: QueryGradConfig,
    *,
    block_m: int,
    block_n: int,
    **constants,
) -> None:
    batch, heads, q_len, head_dim = q.shape
    launch_kernel(
        query_gradient,
        (cdiv(q_len, config.rows), batch * heads),
        q,
        rows.k,
        rows.v,
        *arguments,
        **widths(head_dim, rows.v.shape[3]),
        BLOCK_M=block_m,
        LOG_BLOCK_N=block_n.bit_length() - 1,
        ROWS=config.rows,
        TILE=config.tile,
        TAIL=config.tail,
        STAGES=config.stages,
        num_warps=config.warps,
        num_stages=config.stages,
        **constants,
    )
