"""What a query block owes to each key block that it sees at a coarse level."""

import triton
import triton.language as tl

from psa_torch.attention.triton.columns import in_columns, load_columns
from psa_torch.attention.triton.products import QueryTile, load_queries, weights
from psa_torch.attention.triton.walk import gather_rows, level_start, load4, select4


@triton.jit(do_not_specialize=["first_head", "first_block", "round_blocks"])
def coarse_partials(
    q_pointer,
    k_pointer,
    v_pointer,
    dout_pointer,
    lse2_pointer,
    delta_pointer,
    entries,
    counts,
    full_counts,
    dk_slots,
    dv_slots,
    q_stride_b,
    q_stride_h,
    dout_stride_b,
    dout_stride_h,
    scale,
    dk_unit,
    heads,
    group,
    q_len,
    kv_len,
    padded_len,
    head_rows,
    skipped,
    q_blocks,
    k_blocks,
    first_head,
    first_block,
    round_blocks,
    Q_STRIDE_M: tl.constexpr,
    DOUT_STRIDE_M: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LOG_BLOCK_N: tl.constexpr,
    G: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
):
    """What query block `first_block + program` of head `first_head + program` owes to the rows it
    sees at level 2**G.

    k_pointer, v_pointer, head_rows, skipped: see `Rows.of_level`.
    dk_slots, dv_slots: `[heads, round_blocks, padded_len >> G, max(D, DV)]` in the dtype of q. A
    row holds what it owes to each key that it covers, dk before the factor `scale` but times
    `dk_unit`, which is about as large. Key blocks that are not listed stay as they are. Rows that
    cover no key are written like others, and end in sums that nothing reads.
    """
    # Of a causal round the last blocks have most to do.
    slot = tl.num_programs(0) - 1 - tl.program_id(0)
    batch_head = first_head + tl.program_id(1)
    batch = (batch_head // heads).to(tl.int64)
    head = batch_head % heads
    kv_head = batch * (heads // group) + head // group
    pyramid = kv_head * head_rows - skipped
    k_pointer += pyramid * D
    v_pointer += pyramid * DV
    ROW: tl.constexpr = D if D > DV else DV
    slots = (tl.program_id(1).to(tl.int64) * round_blocks + slot) * (padded_len >> G) * ROW
    dk_slots += slots
    dv_slots += slots
    q_base = q_pointer + batch * q_stride_b + head.to(tl.int64) * q_stride_h
    dout_base = dout_pointer + batch * dout_stride_b + head.to(tl.int64) * dout_stride_h
    statistics = batch_head.to(tl.int64) * (q_blocks * BLOCK_M)
    lse2_pointer += statistics
    delta_pointer += statistics

    query_block = first_block + slot
    first = query_block * BLOCK_M
    table_row = batch_head * q_blocks + query_block
    n0, n1, n2, n3 = load4(counts, table_row)
    entries += table_row.to(tl.int64) * k_blocks + select4(G, 0, n0, n0 + n1, n0 + n1 + n2)
    stream = select4(G, n0, n1, n2, n3) << (LOG_BLOCK_N - G)
    tiles = tl.cdiv(stream, TILE)
    unmasked = tiles
    if IS_CAUSAL:
        full = tl.load(full_counts + table_row.to(tl.int64) * 4 + G)
        unmasked = (full << (LOG_BLOCK_N - G)) // TILE
    d = tl.arange(0, WIDTH)[None, :]
    e = tl.arange(0, V_WIDTH)[None, :]
    # The query block stays in shared memory where it fits, else its parts come by in turn.
    RESIDENT: tl.constexpr = ROWS == BLOCK_M
    if RESIDENT:
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
    for MASKED in tl.static_range(0, 2 if IS_CAUSAL else 1):
        begin = unmasked if MASKED else 0
        end = tiles if MASKED else unmasked
        for t in tl.range(begin, end, num_stages=STAGES):
            position = t * TILE + tl.arange(0, TILE)
            live = position < stream
            # Places past the end repeat the last row, and are not stored.
            position = tl.minimum(position, stream - 1)
            rows = gather_rows(entries, 0, position, G, padded_len, LOG_BLOCK_N)
            k = load_columns(k_pointer + (rows[:, None] * D + d), d, D, WIDTH)
            v = load_columns(v_pointer + (rows[:, None] * DV + e), e, DV, V_WIDTH)
            run = rows - level_start(padded_len, G)
            last = tl.minimum((run + 1) << G, kv_len) - 1
            dk = tl.zeros([TILE, WIDTH], tl.float32)
            dv = tl.zeros([TILE, V_WIDTH], tl.float32)
            if RESIDENT:
                queries = QueryTile(q, dout, lse2_pointer, delta_pointer, first)
                p, ds = weights(k, v, queries, scale, last, kv_len - q_len, G, MASKED)
                dv = tl.dot(p, dout, dv, input_precision="ieee")
                dk = tl.dot(ds, q, dk, input_precision="ieee")
            else:
                for part in tl.range(0, BLOCK_M, ROWS, num_stages=STAGES):
                    q, dout = load_queries(
                        q_base,
                        dout_base,
                        first + part,
                        q_len,
                        Q_STRIDE_M,
                        DOUT_STRIDE_M,
                        ROWS,
                        D,
                        DV,
                        WIDTH,
                        V_WIDTH,
                    )
                    queries = QueryTile(q, dout, lse2_pointer, delta_pointer, first + part)
                    p, ds = weights(k, v, queries, scale, last, kv_len - q_len, G, MASKED)
                    dv = tl.dot(p, dout, dv, input_precision="ieee")
                    dk = tl.dot(ds, q, dk, input_precision="ieee")
            here = run[:, None] * ROW
            dk *= dk_unit / (1 << G)
            dv *= 1.0 / (1 << G)
            tl.store(
                dk_slots + (here + d),
                dk.to(dk_slots.dtype.element_ty),
                mask=in_columns(live[:, None], d, D, WIDTH),
            )
            tl.store(
                dv_slots + (here + e),
                dv.to(dv_slots.dtype.element_ty),
                mask=in_columns(live[:, None], e, DV, V_WIDTH),
            )
