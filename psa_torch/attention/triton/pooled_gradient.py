"""dk and dv of a coarse level: sums per query block, then sums over query blocks.

A key block has few rows of a coarse level, too few to pay for reading a block of queries. So one
kernel takes a query block at a time, whose rows of the level fill whole tiles, and writes what
it adds to each key block it sees into a slot of that pair; a second one adds the slots up.
Slots are addressed by head, query block and key block: no atomics, no counting, a fixed order of
addition. The work goes in rounds, so that the slots fit a workspace of bounded size: a few key
heads at a time, or, where one head alone has too many slots, a few query blocks of every head,
whose sums are then read and written again in every round.
"""

import itertools
import math

import triton
import triton.language as tl
from torch import Tensor

from psa_torch._triton.launch import launch_kernel
from psa_torch.attention.triton.columns import in_columns, load_columns
from psa_torch.attention.triton.configs import PooledGradConfig, widths
from psa_torch.attention.triton.plan import Plan
from psa_torch.attention.triton.products import load_queries, weights
from psa_torch.attention.triton.row_statistics import RowStatistics
from psa_torch.attention.triton.rows import Rows
from psa_torch.attention.triton.walk import gather_rows, level_start, load4, select4
from psa_torch.kernels._launch import resident_programs
from shared_specs.pyramid import padded_length


@triton.jit(do_not_specialize=["first_head", "first_block", "round_blocks"])
def pooled_partials(
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
                p, ds = weights(
                    k,
                    v,
                    q,
                    dout,
                    lse2_pointer,
                    delta_pointer,
                    first,
                    scale,
                    last,
                    kv_len - q_len,
                    G,
                    ROWS,
                    MASKED,
                )
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
                    p, ds = weights(
                        k,
                        v,
                        q,
                        dout,
                        lse2_pointer,
                        delta_pointer,
                        first + part,
                        scale,
                        last,
                        kv_len - q_len,
                        G,
                        ROWS,
                        MASKED,
                    )
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


@triton.jit(do_not_specialize=["first_head", "first_block", "round_blocks"])
def pooled_sums(
    slots,
    entries,
    counts,
    pooled,
    slots_of_one,
    pooled_of_one,
    dk_unit,
    group,
    padded_len,
    q_blocks,
    k_blocks,
    first_head,
    first_block,
    round_blocks,
    D: tl.constexpr,
    DV: tl.constexpr,
    WIDTH: tl.constexpr,
    LOG_BLOCK_N: tl.constexpr,
    G: tl.constexpr,
    SLOTS: tl.constexpr,
    LIST: tl.constexpr,
    FIRST_ROUND: tl.constexpr,
):
    """Adds the slots of one round to the rows of one key block, `SLOTS` at a time.

    Grid: key blocks, key heads of the round, dk and dv: lists differ much in length, so that fewer
    and longer programs would wait for the longest.

    entries, counts: the key plan, which says whose slots there are, in ascending order.
    slots, pooled: those of dk; those of dv are `slots_of_one` and `pooled_of_one` numbers behind.
    `pooled` is as in `key_gradient`; the first round starts from what the level above owes.
    """
    RUN: tl.constexpr = (1 << LOG_BLOCK_N) >> G
    key_block = tl.program_id(0)
    batch_kv_head = first_head // group + tl.program_id(1)
    which = tl.program_id(2)
    slots += which.to(tl.int64) * slots_of_one
    pooled += which.to(tl.int64) * pooled_of_one
    ROW: tl.constexpr = D if D > DV else DV
    pooled += batch_kv_head.to(tl.int64) * (padded_len - padded_len // 8) * ROW
    d = tl.arange(0, WIDTH)[None, :]
    if D == DV:
        columns = D
    else:
        columns = tl.where(which == 0, D, DV)
    run = key_block * RUN + tl.arange(0, RUN)
    own = run[:, None] * ROW + d
    slot_numbers = (padded_len >> G).to(tl.int64) * ROW
    total = tl.zeros([RUN, WIDTH], tl.float32)
    for member in tl.range(0, group, num_stages=1):
        batch_head = batch_kv_head * group + member
        table_row = batch_head * k_blocks + key_block
        n0, n1, n2, n3 = load4(counts, table_row)
        count = select4(G, n0, n1, n2, n3)
        listed = entries + table_row.to(tl.int64) * q_blocks
        listed += select4(G, 0, n0, n0 + n1, n0 + n1 + n2)
        # Entries ascend, so those of this round are the ones between two counts.
        begin = 0
        end = 0
        for at in tl.range(0, count, LIST, num_stages=1):
            place = at + tl.arange(0, LIST)
            of_round = tl.load(listed + place, mask=place < count, other=2**30) - first_block
            begin += tl.sum((of_round < 0).to(tl.int32), 0)
            end += tl.sum((of_round < round_blocks).to(tl.int32), 0)
        base = (batch_head - first_head).to(tl.int64) * round_blocks - first_block
        for at in tl.range(begin, end, SLOTS, num_stages=1):
            for ahead in tl.static_range(SLOTS):
                live = at + ahead < end
                slot = base + tl.load(listed + at + ahead, mask=live, other=first_block)
                live = tl.full([RUN, 1], at + ahead, tl.int32) < end
                if WIDTH > D or WIDTH > DV:
                    live = live & (d < columns)
                here = tl.load(slots + slot * slot_numbers + own, mask=live, other=0.0)
                total += here.to(tl.float32)
    total *= tl.where(which == 0, 1.0 / dk_unit, 1.0)

    here = (level_start(padded_len, G) - padded_len) * ROW + own
    if FIRST_ROUND:
        if G < 3:
            above = level_start(padded_len, G + 1) - padded_len + (run >> 1)
            total += _load_sums(pooled + (above[:, None] * ROW + d), d, columns, D, DV, WIDTH)
    else:
        total += _load_sums(pooled + here, d, columns, D, DV, WIDTH)
    if WIDTH > D or WIDTH > DV:
        tl.store(pooled + here, total, mask=d < columns)
    else:
        tl.store(pooled + here, total)


@triton.jit
def _load_sums(pointer, d, columns, D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr):
    """The first `columns` columns, D or DV of WIDTH; zeros in the others."""
    if WIDTH > D or WIDTH > DV:
        x = tl.load(pointer, mask=d < columns, other=0.0)
    else:
        x = tl.load(pointer)
    return x


SLOTS_AT_ONCE = 8
"""Slots that a program of `pooled_sums` has on their way at once."""

WARP_BYTES = 512
"""What a warp loads at once, 16 bytes a thread."""

LIST_WIDTH = 128
"""Entries of the table that a program of `pooled_sums` looks at in one step."""

PROGRAMS_PER_PROCESSOR = 2


def round_size(
    q: Tensor, group: int, slot_elements: int, budget: int, q_blocks: int
) -> tuple[int, int]:
    """(heads, query blocks) of one round: whole groups of heads, and at least one block.

    Whole heads, as many as `budget` bytes hold, or one group of them if that takes no more than
    four times the budget; else all heads, and as many query blocks as the budget holds, or as
    give every multiprocessor work, up to four times the budget again.

    Args:
        q: `[B, H, Lq, D]`.
        group: query heads per key head.
        slot_elements: numbers that one query block of one head writes at most.
        q_blocks: all query blocks of a head.
    """
    heads = max(1, q.shape[0] * q.shape[1])
    of_block = slot_elements * q.element_size()
    of_group = group * q_blocks * of_block
    groups = max(budget // of_group, int(of_group <= 4 * budget))
    if groups:
        rounds = -(-heads // (groups * group))
        return -(-heads // (rounds * group)) * group, q_blocks
    of_block *= heads
    to_fill = -(-resident_programs(q, PROGRAMS_PER_PROCESSOR) // heads)
    most = max(1, budget // of_block, min(to_fill, 4 * budget // of_block))
    rounds = -(-q_blocks // most)
    return heads, -(-q_blocks // rounds)


def launch_pooled_gradient(
    q: Tensor,
    rows: Rows,
    dout: Tensor,
    statistics: RowStatistics,
    by_query: Plan,
    by_key: Plan,
    pooled: Tensor,
    *,
    g: int,
    kv_len: int,
    block_m: int,
    block_n: int,
    scale: float,
    is_causal: bool,
    config: PooledGradConfig,
) -> None:
    """Level `2**g > 1` of the gradients, into its rows of `pooled`.

    Args:
        by_query, by_key: the plans of the level mask.
        pooled: float32 `[2, B, Hk, P - Lk', max(D, Dv)]`, whose rows of coarser levels are
            complete.
    """
    batch, heads, q_len, head_dim = q.shape
    k, v, head_rows, skipped = rows.of_level(g)
    row = max(head_dim, v.shape[3])
    columns = widths(head_dim, v.shape[3])
    kv_heads = k.shape[1]
    padded_len = padded_length(kv_len, block_n)
    q_blocks, k_blocks = by_query.entries.shape[2:]
    slot_rows = padded_len >> g
    group = heads // kv_heads
    round_heads, round_blocks = round_size(
        q, group, 2 * slot_rows * row, config.workspace, q_blocks
    )
    slots = q.new_empty(2, round_heads, round_blocks, slot_rows, row)
    # A power of two near `scale`, so that a slot of dk has the size of dk; 1 for scale 0.
    dk_unit = 2.0 ** max(-32, min(32, math.frexp(scale)[1]))
    log_block_n = block_n.bit_length() - 1
    width = max(columns["WIDTH"], columns["V_WIDTH"])
    slot_bytes = (block_n >> g) * width * q.element_size()
    rounds = itertools.product(
        range(0, batch * heads, round_heads), range(0, q_blocks, round_blocks)
    )
    for first_head, first_block in rounds:
        taken_heads = min(round_heads, batch * heads - first_head)
        blocks = min(round_blocks, q_blocks - first_block)
        launch_kernel(
            pooled_partials,
            (blocks, taken_heads),
            q,
            k,
            v,
            dout,
            statistics.lse2,
            statistics.delta,
            *by_query,
            slots[0],
            slots[1],
            *q.stride()[:2],
            *dout.stride()[:2],
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
            Q_STRIDE_M=q.stride(2),
            DOUT_STRIDE_M=dout.stride(2),
            **columns,
            BLOCK_M=block_m,
            LOG_BLOCK_N=log_block_n,
            G=g,
            TILE=config.tile,
            ROWS=config.rows,
            STAGES=config.stages,
            IS_CAUSAL=is_causal,
            num_warps=config.warps,
            num_stages=config.stages,
        )
        launch_kernel(
            pooled_sums,
            (k_blocks, taken_heads // group, 2),
            slots,
            by_key.entries,
            by_key.counts,
            pooled,
            slots[0].numel(),
            pooled[0].numel(),
            dk_unit,
            group,
            padded_len,
            q_blocks,
            k_blocks,
            first_head,
            first_block,
            round_blocks,
            D=head_dim,
            DV=v.shape[3],
            WIDTH=width,
            LOG_BLOCK_N=log_block_n,
            G=g,
            SLOTS=SLOTS_AT_ONCE,
            LIST=LIST_WIDTH,
            FIRST_ROUND=first_block == 0,
            num_warps=max(1, min(4, slot_bytes // WARP_BYTES)),
        )
