"""dk and dv of one level, one program per group of pyramid rows of one key block.

For rows enough to pay for reading the query blocks that see them; shorter runs of rows take
`coarse_gradient`.
"""

import triton
import triton.language as tl
from torch import Tensor

from psa_torch._triton.launch import launch_kernel
from psa_torch.attention.triton.columns import in_columns, load_columns, store_columns
from psa_torch.attention.triton.configs import KeyGradConfig, widths
from psa_torch.attention.triton.plan import Plan
from psa_torch.attention.triton.products import QueryTile, add_products, load_queries
from psa_torch.attention.triton.row_statistics import RowStatistics
from psa_torch.attention.triton.rows import Rows
from psa_torch.attention.triton.walk import level_start, load4, select4
from shared_specs.geometry import Geometry


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
    head_rows,
    skipped,
    q_blocks,
    k_blocks,
    Q_STRIDE_M: tl.constexpr,
    DOUT_STRIDE_M: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LOG_BLOCK_N: tl.constexpr,
    G: tl.constexpr,
    OWN: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
):
    """Gradients of `OWN` pyramid rows of level `2**G < 8`, from all heads of their group.

    k_pointer, v_pointer, head_rows, skipped: see `Rows.of_level`.
    dk_pooled, dv_pooled: float32 `[B, Hk, P - Lk', max(D, DV)]`, what each pooled row owes to every
    key that it covers (dk before the factor `scale`), coarser levels included.
    Level 1 writes dk `[B, Hk, Lk, D]` and dv `[B, Hk, Lk, DV]` instead.
    WIDTH, V_WIDTH: see `forward.attention_forward`.
    The row strides are compile-time constants because the loop has no registers to spare.
    """
    RUN: tl.constexpr = (1 << LOG_BLOCK_N) >> G
    # The keys are the tall side of the products where they can be (64 rows on Hopper).
    KEYS_FIRST: tl.constexpr = OWN >= 64
    key_block = tl.program_id(0) // (RUN // OWN)
    batch_kv_head = tl.program_id(1)
    batch = batch_kv_head // kv_heads
    kv_head = batch_kv_head % kv_heads
    run = tl.program_id(0) * OWN + tl.arange(0, OWN)
    d = tl.arange(0, WIDTH)
    e = tl.arange(0, V_WIDTH)
    rows = level_start(padded_len, G) + run
    pyramid = batch_kv_head.to(tl.int64) * head_rows - skipped
    # Keys that are read where they are end with the last of them.
    there = (rows - skipped < head_rows)[:, None]
    k = tl.load(
        k_pointer + (pyramid * D + (rows[:, None] * D + d[None, :])),
        mask=in_columns(there, d[None, :], D, WIDTH),
        other=0.0,
    )
    v = tl.load(
        v_pointer + (pyramid * DV + (rows[:, None] * DV + e[None, :])),
        mask=in_columns(there, e[None, :], DV, V_WIDTH),
        other=0.0,
    )
    last = tl.minimum((run + 1) << G, kv_len) - 1
    ROW: tl.constexpr = D if D > DV else DV
    pooled = batch_kv_head.to(tl.int64) * (padded_len - padded_len // 8) * ROW
    dk_pooled += pooled
    dv_pooled += pooled
    if KEYS_FIRST:
        column = d[None, :]
        v_column = e[None, :]
        run = run[:, None]
    else:
        column = d[:, None]
        v_column = e[:, None]
        run = run[None, :]
    # Sums are 2**G times what a key is owed (see `add_products`). They start from what the
    # level above owes, before the loop needs registers.
    above = (level_start(padded_len, G + 1) - padded_len + (run >> 1)) * ROW
    dk = load_columns(dk_pooled + (above + column), column, D, WIDTH) * (1 << G)
    dv = load_columns(dv_pooled + (above + v_column), v_column, DV, V_WIDTH) * (1 << G)

    PARTS: tl.constexpr = BLOCK_M // ROWS
    for member in tl.range(0, group, num_stages=1):
        head = kv_head * group + member
        batch_head = batch_kv_head * group + member
        table_row = batch_head * k_blocks + key_block
        n0, n1, n2, n3 = load4(counts, table_row)
        listed = entries + table_row.to(tl.int64) * q_blocks
        listed += select4(G, 0, n0, n0 + n1, n0 + n1 + n2)
        count = select4(G, n0, n1, n2, n3)
        q_base = q_pointer + batch.to(tl.int64) * q_stride_b + head.to(tl.int64) * q_stride_h
        dout_base = (
            dout_pointer + batch.to(tl.int64) * dout_stride_b + head.to(tl.int64) * dout_stride_h
        )
        statistics = batch_head.to(tl.int64) * (q_blocks * BLOCK_M)
        masked = 0
        if IS_CAUSAL:
            masked = count - tl.load(full_counts + table_row.to(tl.int64) * 4 + G)
        # The query blocks that straddle the diagonal come first in the list.
        for MASKED in tl.static_range(1 if IS_CAUSAL else 0, -1, -1):
            begin = 0 if MASKED else masked
            end = masked if MASKED else count
            for t in tl.range(begin * PARTS, end * PARTS, num_stages=STAGES):
                first = tl.load(listed + t // PARTS) * BLOCK_M + t % PARTS * ROWS
                q, dout = load_queries(
                    q_base,
                    dout_base,
                    first,
                    q_len,
                    Q_STRIDE_M,
                    DOUT_STRIDE_M,
                    ROWS,
                    D,
                    DV,
                    WIDTH,
                    V_WIDTH,
                )
                queries = QueryTile(
                    q, dout, lse2_pointer + statistics, delta_pointer + statistics, first
                )
                dk, dv = add_products(
                    k, v, dk, dv, queries, scale, last, kv_len - q_len, G, KEYS_FIRST, MASKED
                )

    if G > 0:
        here = (level_start(padded_len, G) - padded_len + run) * ROW
        store_columns(dk_pooled + (here + column), dk * (1.0 / (1 << G)), column, D, WIDTH)
        store_columns(dv_pooled + (here + v_column), dv * (1.0 / (1 << G)), v_column, DV, V_WIDTH)
    else:
        keys = batch_kv_head.to(tl.int64) * kv_len
        live = run < kv_len
        tl.store(
            dk_pointer + keys * D + (run * D + column),
            (dk * scale).to(dk_pointer.dtype.element_ty),
            mask=in_columns(live, column, D, WIDTH),
        )
        tl.store(
            dv_pointer + keys * DV + (run * DV + v_column),
            dv.to(dv_pointer.dtype.element_ty),
            mask=in_columns(live, v_column, DV, V_WIDTH),
        )


def launch_key_gradient(
    q: Tensor,
    rows: Rows,
    dout: Tensor,
    statistics: RowStatistics,
    plan: Plan,
    pooled: Tensor,
    dk: Tensor,
    dv: Tensor,
    geometry: Geometry,
    *,
    g: int,
    scale: float,
    config: KeyGradConfig,
) -> None:
    """Level `2**g < 8` of the gradients: into its rows of `pooled`, or dk and dv at level 1.

    Args:
        plan: the key plan of the level mask.
        pooled: float32 `[2, B, Hk, P - Lk', max(D, Dv)]`, whose rows of the level above are
            complete.
        dk, dv: `[B, Hk, Lk, D]` and `[B, Hk, Lk, Dv]`.
    """
    heads, head_dim = q.shape[1], q.shape[3]
    k, v, head_rows, skipped = rows.of_level(g)
    batch, kv_heads = k.shape[:2]
    launch_kernel(
        key_gradient,
        ((geometry.padded_len >> g) // config.keys, batch * kv_heads),
        q,
        k,
        v,
        dout,
        statistics.lse2,
        statistics.delta,
        *plan,
        pooled[0],
        pooled[1],
        dk,
        dv,
        *q.stride()[:2],
        *dout.stride()[:2],
        scale,
        kv_heads,
        heads // kv_heads,
        geometry.q_len,
        geometry.kv_len,
        geometry.padded_len,
        head_rows,
        skipped,
        plan.entries.shape[3],
        plan.entries.shape[2],
        Q_STRIDE_M=q.stride(2),
        DOUT_STRIDE_M=dout.stride(2),
        **widths(head_dim, v.shape[3]),
        BLOCK_M=geometry.block_m,
        LOG_BLOCK_N=geometry.block_n.bit_length() - 1,
        G=g,
        OWN=config.keys,
        ROWS=config.rows,
        STAGES=config.stages,
        IS_CAUSAL=geometry.is_causal,
        num_warps=config.warps,
        num_stages=config.stages,
    )
