"""Sums over the query blocks that left something for a key block, in the order of the table."""

import triton
import triton.language as tl

from psa_torch.attention.triton.walk import level_start, load4, select4

SLOTS_AT_ONCE = 8
"""Slots that a program of `coarse_sums` has on their way at once."""

WARP_BYTES = 512
"""What a warp loads at once, 16 bytes a thread."""

LIST_WIDTH = 128
"""Entries of the table that a program of `coarse_sums` looks at in one step."""


@triton.jit(do_not_specialize=["first_head", "first_block", "round_blocks"])
def coarse_sums(
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
