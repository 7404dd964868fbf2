"""Levels under a cost budget (specification, section 6, `budget`), integer for integer.

A block's level changes at most four times as lambda grows. With a budget for each head, every
change enters a histogram over lambda: first 128 bins an octave, then the one bin in which the
budget is met in up to 4,096, then what is left of it, if anything is. Octaves, because changes
crowd at small lambda, and additions to one place wait for each other; integer sums do not depend on
their order. With a budget for each row, a program holds the row and halves the interval of lambda,
as the rule does.

Counts at 24 heads, 256 x 512 blocks: 50 MB of defects, read four times; some 500 integer
instructions a block and pass.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from psa_torch._triton.launch import launch_kernel
from psa_torch.kernels._launch import next_power_of_2, on_device_of, require_dtype
from psa_torch.kernels.blocks import rank_keys, store_levels
from psa_torch.kernels.budget_choice import (
    best_levels,
    crossing,
    integer_defects,
    kinds_of_blocks,
    next_changes,
    raw_bits,
)
from psa_torch.kernels.table import warps_for_row
from shared_specs.budget import precision_bits
from shared_specs.config import PSAConfig
from shared_specs.geometry import cdiv
from shared_specs.selection import candidate_blocks

BINS = 4096
"""Of the first two histograms; 128 for each of up to 25 octaves are fewer."""
LAST_BINS = 64
"""Of the third."""


def budget_levels(defects: Tensor, config: PSAConfig, *, q_len: int, kv_len: int) -> Tensor:
    """Levels of every (query block, key block) pair.

    Args:
        defects: float32 `[B, H, Nq, Nk, 4]`; NaN and negative ones count as 0.
        config: the budget, and the text, sink and causal rules.
        q_len, kv_len: tokens; `Nq = ceil(q_len / block_m)`, `Nk = ceil(kv_len / block_n)`.

    Returns:
        int32 `[B, H, Nq, Nk]`, contiguous, values in {0, 1, 2, 4, 8}, at least one above 0 in
        every row.

    Raises:
        TypeError: defects are not float32.
    """
    require_dtype("scores", defects, (torch.float32,))
    defects = defects.contiguous()
    batch, heads, q_blocks, k_blocks, _ = defects.shape
    levels = defects.new_empty(defects.shape[:4], dtype=torch.int32)
    bits = precision_bits(config.block_n)
    width = max(32, next_power_of_2(k_blocks))
    sizes = (q_blocks, k_blocks, q_len, kv_len, config.text_length, config.sink_blocks)
    constants = {
        "BITS": bits,
        "REST": int(config.is_rest_mean),
        "HAS_2": 2 in config.budget_levels,
        "HAS_4": 4 in config.budget_levels,
        "HAS_8": 8 in config.budget_levels,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "IS_CAUSAL": config.causal,
        "TEXT": config.text_length > 0,
        "TEXT_FIRST": config.text_position == "start",
        "WIDTH": width,
        "num_warps": warps_for_row(width),
    }
    grid = (batch * heads * q_blocks,)
    with on_device_of(defects):
        if config.budget_scope == "row":
            share = config.budget * config.block_n
            launch_kernel(levels_by_row, grid, defects, levels, *sizes, SHARE=share, **constants)
            return levels
        tops = defects.new_empty(batch * heads, q_blocks, dtype=torch.int32)
        places = 2 * BINS + LAST_BINS + 1
        found = defects.new_empty(batch * heads, places, dtype=torch.int32)
        limit = _limit(q_len, kv_len, config)
        constants |= {"BINS": BINS, "LAST_BINS": LAST_BINS, "ROWS": next_power_of_2(q_blocks)}
        share = next_power_of_2(cdiv(places, q_blocks))
        launch_kernel(largest_of_rows, grid, defects, tops, found, *sizes, SHARE=share, **constants)
        for digit in range(3):
            launch_kernel(
                count_changes,
                grid,
                defects,
                tops,
                found,
                limit,
                *sizes,
                DIGIT=digit,
                **constants,
            )
        launch_kernel(
            levels_by_head, grid, defects, tops, found, levels, limit, *sizes, **constants
        )
    return levels


@functools.lru_cache(maxsize=256)
def _limit(q_len: int, kv_len: int, config: PSAConfig) -> int:
    """W of a head, in the same float64 product as `shared_specs.budget.cost_limits`."""
    candidates = int(candidate_blocks(q_len, kv_len, config).sum())
    return math.floor(float(candidates) * (config.budget * config.block_n))


@triton.jit
def _octave_bin(lam):
    """Bin of a lambda in 1 … 2^25 - 1, 128 an octave: its exponent and leading bits as a float."""
    # Exact as float32: from 2^24 on without its last bit, which no bin sees.
    exact = tl.where(lam >= 1 << 24, lam & -2, lam)
    return (exact.to(tl.float32).to(tl.int32, bitcast=True) >> 16) - (127 << 7)


@triton.jit
def _digits(found, limit, BINS: tl.constexpr, LAST_BINS: tl.constexpr, DIGIT: tl.constexpr):
    """Where the first `DIGIT` histograms say the budget is met.

    Returns:
        the octave bin (`BINS` if it is met nowhere), its least lambda, the second bin, the shift
        that makes second bins, and what is still to be saved in this place.
    """
    over = tl.load(found + (2 * BINS + LAST_BINS)) - limit
    first, before = crossing(found, over, BINS)
    octave, part = first >> 7, first & 127
    start = ((128 + part) << tl.maximum(octave - 7, 0)) >> tl.maximum(7 - octave, 0)
    shift = tl.maximum(octave - 7 - 12, 0)
    second = first * 0
    if DIGIT > 1:
        second, more = crossing(found + BINS, over - before, BINS)
        before += more
    return first, start, second, shift, over - before


@triton.jit
def largest_of_rows(
    defects,
    tops,
    found,
    q_blocks,
    k_blocks,
    q_len,
    kv_len,
    text_length,
    sink_blocks,
    BITS: tl.constexpr,
    REST: tl.constexpr,
    HAS_2: tl.constexpr,
    HAS_4: tl.constexpr,
    HAS_8: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    TEXT: tl.constexpr,
    TEXT_FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    BINS: tl.constexpr,
    LAST_BINS: tl.constexpr,
    ROWS: tl.constexpr,
    SHARE: tl.constexpr,
):
    """Bits of the largest defect at rest among the free blocks of each row, `[B * H, Nq]`; and
    zeros to the row's share of the histograms."""
    pid = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    candidate, forced = kinds_of_blocks(
        tl.program_id(0) % q_blocks, k_blocks, q_len, kv_len, text_length, sink_blocks,
        BLOCK_M, BLOCK_N, IS_CAUSAL, TEXT, TEXT_FIRST, WIDTH,
    )  # fmt: skip
    raw = raw_bits(defects, pid * k_blocks + column, column < k_blocks, 3)
    tl.store(tops + pid, tl.max(tl.where(candidate & (forced == 0), raw, 0), 0))
    places: tl.constexpr = 2 * BINS + LAST_BINS + 1
    at = tl.program_id(0) % q_blocks * SHARE + tl.arange(0, SHARE)
    tl.store(found + pid // q_blocks * places + at, tl.zeros_like(at), mask=at < places)


@triton.jit
def count_changes(
    defects,
    tops,
    found,
    limit,
    q_blocks,
    k_blocks,
    q_len,
    kv_len,
    text_length,
    sink_blocks,
    BITS: tl.constexpr,
    REST: tl.constexpr,
    HAS_2: tl.constexpr,
    HAS_4: tl.constexpr,
    HAS_8: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    TEXT: tl.constexpr,
    TEXT_FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    BINS: tl.constexpr,
    LAST_BINS: tl.constexpr,
    ROWS: tl.constexpr,
    DIGIT: tl.constexpr,
):
    """What a row saves at each lambda, added to one of its head's histograms.

    found `[B * H, 2 * BINS + LAST_BINS + 1]`: three histograms, and the cost at lambda 0, which the
    first launch adds up too.
    """
    pid = tl.program_id(0).to(tl.int64)
    head = pid // q_blocks
    column = tl.arange(0, WIDTH)
    candidate, forced = kinds_of_blocks(
        tl.program_id(0) % q_blocks, k_blocks, q_len, kv_len, text_length, sink_blocks,
        BLOCK_M, BLOCK_N, IS_CAUSAL, TEXT, TEXT_FIRST, WIDTH,
    )  # fmt: skip
    free = candidate & (forced == 0)
    rows = tl.arange(0, ROWS)
    top = tl.max(tl.load(tops + head * q_blocks + rows, mask=rows < q_blocks, other=0), 0)
    found += head * (2 * BINS + LAST_BINS + 1)
    if DIGIT > 0:
        first, start, second, shift, _ = _digits(found, limit, BINS, LAST_BINS, DIGIT)
        if DIGIT == 2 and shift == 0:  # second bins of one lambda each
            return
    two, four, eight, rest = integer_defects(
        defects, pid * k_blocks + column, column < k_blocks, top, BITS
    )
    level, price = best_levels(0, two, four, eight, rest, BLOCK_N, REST, HAS_2, HAS_4, HAS_8)
    if DIGIT == 0:
        cost = tl.where(free, price, tl.where(forced, BLOCK_N, 0))
        tl.atomic_add(found + (2 * BINS + LAST_BINS), tl.sum(cost, 0), sem="relaxed")
    never = tl.full([WIDTH], 0x7FFFFFFF, tl.int32)
    of_1, of_2, of_4, of_8 = next_changes(
        two, four, eight, rest, BLOCK_N, REST, HAS_2, HAS_4, HAS_8
    )
    for _ in tl.static_range(4):
        change = tl.where(level == 8, of_8, never)
        change = tl.where(level == 4, of_4, change)
        change = tl.where(level == 2, of_2, change)
        change = tl.where(level == 1, of_1, change)
        # At 2^BITS every block has changed for the last time; that end needs no count.
        moved = free & (change < (1 << BITS))
        at = tl.where(moved, change, 0)
        next_level, next_price = best_levels(
            at, two, four, eight, rest, BLOCK_N, REST, HAS_2, HAS_4, HAS_8
        )
        saved = tl.where(moved, price - next_price, 0)
        place = _octave_bin(at)
        if DIGIT > 0:
            moved_here = moved & (place == first)
            place = (at - start) >> shift
            if DIGIT == 2:
                moved_here = moved_here & (place == second)
                place = (at - start) & ((1 << shift) - 1)
            tl.atomic_add(found + DIGIT * BINS + place, saved, mask=moved_here, sem="relaxed")
        else:
            tl.atomic_add(found + place, saved, mask=moved, sem="relaxed")
        price = tl.where(moved, next_price, price)
        level = tl.where(moved, next_level, level)


@triton.jit
def levels_by_head(
    defects,
    tops,
    found,
    levels,
    limit,
    q_blocks,
    k_blocks,
    q_len,
    kv_len,
    text_length,
    sink_blocks,
    BITS: tl.constexpr,
    REST: tl.constexpr,
    HAS_2: tl.constexpr,
    HAS_4: tl.constexpr,
    HAS_8: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    TEXT: tl.constexpr,
    TEXT_FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    BINS: tl.constexpr,
    LAST_BINS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Levels of one row at the lambda of its head."""
    pid = tl.program_id(0).to(tl.int64)
    head = pid // q_blocks
    column = tl.arange(0, WIDTH)
    inside = column < k_blocks
    candidate, forced = kinds_of_blocks(
        tl.program_id(0) % q_blocks, k_blocks, q_len, kv_len, text_length, sink_blocks,
        BLOCK_M, BLOCK_N, IS_CAUSAL, TEXT, TEXT_FIRST, WIDTH,
    )  # fmt: skip
    rows = tl.arange(0, ROWS)
    top = tl.max(tl.load(tops + head * q_blocks + rows, mask=rows < q_blocks, other=0), 0)
    found += head * (2 * BINS + LAST_BINS + 1)
    first, start, second, shift, left = _digits(found, limit, BINS, LAST_BINS, 2)
    third, _ = crossing(found + 2 * BINS, left, LAST_BINS)
    lam = start + (second << shift) + tl.where(shift > 0, third, 0)
    lam = tl.where(first < BINS, lam, 1 << BITS)
    over = tl.load(found + (2 * BINS + LAST_BINS)) - limit
    lam = tl.where(over > 0, lam, 0)
    at = pid * k_blocks + column
    two, four, eight, rest = integer_defects(defects, at, inside, top, BITS)
    level, _ = best_levels(lam, two, four, eight, rest, BLOCK_N, REST, HAS_2, HAS_4, HAS_8)
    key = rank_keys(tl.load(defects + at * 4 + 3, mask=inside, other=0.0), candidate)
    store_levels(levels, at, level, key, forced, inside)


@triton.jit
def levels_by_row(
    defects,
    levels,
    q_blocks,
    k_blocks,
    q_len,
    kv_len,
    text_length,
    sink_blocks,
    SHARE: tl.constexpr,
    BITS: tl.constexpr,
    REST: tl.constexpr,
    HAS_2: tl.constexpr,
    HAS_4: tl.constexpr,
    HAS_8: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    TEXT: tl.constexpr,
    TEXT_FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Levels of one row that has a budget of its own."""
    pid = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < k_blocks
    candidate, forced = kinds_of_blocks(
        tl.program_id(0) % q_blocks, k_blocks, q_len, kv_len, text_length, sink_blocks,
        BLOCK_M, BLOCK_N, IS_CAUSAL, TEXT, TEXT_FIRST, WIDTH,
    )  # fmt: skip
    free = candidate & (forced == 0)
    at = pid * k_blocks + column
    raw = raw_bits(defects, at, inside, 3)
    top = tl.max(tl.where(free, raw, 0), 0)
    two, four, eight, rest = integer_defects(defects, at, inside, top, BITS)
    n = tl.sum(candidate.to(tl.int32), 0)
    limit = tl.floor(n.to(tl.float64) * SHARE).to(tl.int32)
    low = n * 0
    high = low + (1 << BITS)
    for _ in tl.range(BITS + 1):
        middle = (low + high) >> 1
        _, price = best_levels(middle, two, four, eight, rest, BLOCK_N, REST, HAS_2, HAS_4, HAS_8)
        cost = tl.sum(tl.where(free, price, tl.where(forced, BLOCK_N, 0)), 0)
        fits = cost <= limit
        low = tl.where(fits, low, tl.minimum(middle + 1, high))
        high = tl.where(fits, middle, high)
    level, _ = best_levels(high, two, four, eight, rest, BLOCK_N, REST, HAS_2, HAS_4, HAS_8)
    key = rank_keys(tl.load(defects + at * 4 + 3, mask=inside, other=0.0), candidate)
    store_levels(levels, at, level, key, forced, inside)
