"""Levels under a cost budget (specification, section 6, `budget`), integer for integer.

A block's level changes at most four times as lambda grows. With a budget for each head, every
change enters a histogram over lambda, first by its leading 12 bits, then, of the one bin in which
the budget is met, by the others; integer sums do not depend on their order. With a budget for each
row, a program holds the row and halves the interval of lambda, as the rule does.

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
from psa_torch.kernels.table import warps_for_row
from shared_specs.budget import precision_bits
from shared_specs.config import PSAConfig
from shared_specs.geometry import cdiv
from shared_specs.selection import candidate_blocks

HIGH_BITS = 12


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
        bins = (1 << HIGH_BITS, 1 << (bits - HIGH_BITS))
        found = defects.new_empty(batch * heads, sum(bins) + 1, dtype=torch.int32)
        limit = _limit(q_len, kv_len, config)
        constants |= {"SHIFT": bits - HIGH_BITS, "ROWS": next_power_of_2(q_blocks)}
        share = next_power_of_2(cdiv(sum(bins) + 1, q_blocks))
        launch_kernel(largest_of_rows, grid, defects, tops, found, *sizes, SHARE=share, **constants)
        for is_low in (False, True):
            launch_kernel(
                count_changes,
                grid,
                defects,
                tops,
                found,
                limit,
                *sizes,
                IS_LOW=is_low,
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
def _raw(pointer, at, inside, LEVEL: tl.constexpr):
    """Bits of the defects of one level, which order like the numbers; NaN and negative give 0."""
    defect = tl.load(pointer + at * 4 + LEVEL, mask=inside, other=0.0)
    return tl.where(defect > 0, defect, 0.0).to(tl.int32, bitcast=True)


@triton.jit
def _kinds(
    row,
    k_blocks,
    q_len,
    kv_len,
    text_length,
    sink_blocks,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    TEXT: tl.constexpr,
    TEXT_FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Which blocks of a row are candidates, and which of those level 1 is forced upon."""
    column = tl.arange(0, WIDTH)
    first = row * BLOCK_M
    last = tl.minimum(first + BLOCK_M, q_len) - 1
    candidate = column < k_blocks
    if IS_CAUSAL:
        first += kv_len - q_len
        last += kv_len - q_len
        candidate = candidate & (column * BLOCK_N <= last)
    first_key = column * BLOCK_N
    last_key = tl.minimum(first_key + BLOCK_N, kv_len) - 1
    forced = column < sink_blocks
    if TEXT:
        if TEXT_FIRST:
            forced = forced | (first < text_length) | (first_key < text_length)
        else:
            text_from = (kv_len if IS_CAUSAL else q_len) - text_length
            forced = forced | (last >= text_from) | (last_key >= kv_len - text_length)
    if IS_CAUSAL:
        # Some row sees some but not all keys of the block.
        forced = forced | (tl.maximum(first, first_key) <= tl.minimum(last, last_key - 1))
    return candidate, forced & candidate


@triton.jit
def _scaled(raw, top, BITS: tl.constexpr):
    """min(floor(D * 2^(BITS - x)), 2^BITS), `2^x` at or above the group's largest `top`."""
    exponent = tl.maximum(raw >> 23, 1)
    mantissa = (raw & 0x7FFFFF) | tl.where(raw >> 23 > 0, 1 << 23, 0)
    top_exponent = tl.maximum(top >> 23, 1)
    top_mantissa = (top & 0x7FFFFF) | tl.where(top >> 23 > 0, 1 << 23, 0)
    # Integers up to 2^24 are exact in float32: its exponent field is the integer's bit length.
    as_float = top_mantissa.to(tl.float32).to(tl.int32, bitcast=True)
    width = (as_float >> 23) - 127 + ((as_float & 0x7FFFFF) != 0).to(tl.int32)
    shift = exponent - top_exponent - width + BITS
    left = tl.minimum(tl.maximum(shift, 0), 30)
    most = tl.maximum((1 << BITS) >> left, 1)
    raised = tl.where(mantissa >= most, 1 << BITS, mantissa << left)
    lowered = mantissa >> tl.minimum(tl.maximum(-shift, 0), 31)
    scaled = tl.minimum(tl.where(shift >= 0, raised, lowered), 1 << BITS)
    return tl.where((top == 0) | (mantissa == 0), 0, scaled)


@triton.jit
def _integers(pointer, at, inside, top, BITS: tl.constexpr):
    """Integer defects of levels 2, 4, 8 and the rest."""
    two = _scaled(_raw(pointer, at, inside, 0), top, BITS)
    four = _scaled(_raw(pointer, at, inside, 1), top, BITS)
    eight = _scaled(_raw(pointer, at, inside, 2), top, BITS)
    rest = _scaled(_raw(pointer, at, inside, 3), top, BITS)
    return two, four, eight, rest


@triton.jit
def _finer(value, level, price, lam, u, LEVEL: tl.constexpr, PRICE: tl.constexpr):
    """The choice so far, or a finer one that is better; of equals the coarser stays."""
    total = lam * PRICE + u
    better = total < value
    return (
        tl.where(better, total, value),
        tl.where(better, LEVEL, level),
        tl.where(better, PRICE, price),
    )


@triton.jit
def _best(
    lam,
    two,
    four,
    eight,
    rest,
    BLOCK_N: tl.constexpr,
    REST: tl.constexpr,
    HAS_2: tl.constexpr,
    HAS_4: tl.constexpr,
    HAS_8: tl.constexpr,
):
    """Level and price of every block at `lam`."""
    value = lam * REST + rest
    level = tl.zeros_like(rest)
    price = level + REST
    if HAS_8:
        value, level, price = _finer(value, level, price, lam, eight, 8, BLOCK_N // 8)
    if HAS_4:
        value, level, price = _finer(value, level, price, lam, four, 4, BLOCK_N // 4)
    if HAS_2:
        value, level, price = _finer(value, level, price, lam, two, 2, BLOCK_N // 2)
    value, level, price = _finer(value, level, price, lam, 0, 1, BLOCK_N)
    return level, price


@triton.jit
def _sooner(change, finer, coarser, SAVED: tl.constexpr):
    """`change`, or the least lambda at which the coarser choice is as good, if that is less.

    Where the finer choice is the best one its defect is less, so the division is of a positive
    number; elsewhere nobody reads the result.
    """
    return tl.minimum(change, (coarser - finer + (SAVED - 1)) // SAVED)


@triton.jit
def _next_changes(
    two,
    four,
    eight,
    rest,
    BLOCK_N: tl.constexpr,
    REST: tl.constexpr,
    HAS_2: tl.constexpr,
    HAS_4: tl.constexpr,
    HAS_8: tl.constexpr,
):
    """The lambda at which each block leaves level 1, 2, 4 and 8: what it leaves a level for does
    not depend on how it came there."""
    never = tl.full(rest.shape, 0x7FFFFFFF, tl.int32)
    of_1 = _sooner(never, 0, rest, BLOCK_N - REST)
    of_2 = _sooner(never, two, rest, BLOCK_N // 2 - REST)
    of_4 = _sooner(never, four, rest, BLOCK_N // 4 - REST)
    of_8 = _sooner(never, eight, rest, BLOCK_N // 8 - REST)
    if HAS_8:
        of_1 = _sooner(of_1, 0, eight, BLOCK_N - BLOCK_N // 8)
        of_2 = _sooner(of_2, two, eight, BLOCK_N // 2 - BLOCK_N // 8)
        of_4 = _sooner(of_4, four, eight, BLOCK_N // 4 - BLOCK_N // 8)
    if HAS_4:
        of_1 = _sooner(of_1, 0, four, BLOCK_N - BLOCK_N // 4)
        of_2 = _sooner(of_2, two, four, BLOCK_N // 2 - BLOCK_N // 4)
    if HAS_2:
        of_1 = _sooner(of_1, 0, two, BLOCK_N - BLOCK_N // 2)
    return of_1, of_2, of_4, of_8


@triton.jit
def _crossing(pointer, wanted, BINS: tl.constexpr):
    """The bin in which the running sum reaches `wanted`, `BINS` if none; and the sum before it."""
    sums = tl.cumsum(tl.load(pointer + tl.arange(0, BINS)), 0)
    short = sums < wanted
    return tl.sum(short.to(tl.int32), 0), tl.max(tl.where(short, sums, 0), 0)


@triton.jit
def _store_levels(pointer, at, level, raw_rest, is_nan, candidate, forced, inside):
    """Levels of a row; one left without any gets its block of largest defect at rest."""
    column = tl.arange(0, level.shape[0])
    level = tl.where(candidate, level, 0)
    level = tl.where(forced, 1, level)
    if tl.max(level, 0) == 0:
        key = tl.where(candidate, tl.where(is_nan, -1, raw_rest), -2)
        best = tl.min(tl.where(key == tl.max(key, 0), column, level.shape[0]), 0)
        level = tl.where(column == best, 1, level)
    tl.store(pointer + at, level, mask=inside)


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
    SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    SHARE: tl.constexpr,
):
    """Bits of the largest defect at rest among the free blocks of each row, `[B * H, Nq]`; and
    zeros to the row's share of the histograms."""
    pid = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    candidate, forced = _kinds(
        tl.program_id(0) % q_blocks, k_blocks, q_len, kv_len, text_length, sink_blocks,
        BLOCK_M, BLOCK_N, IS_CAUSAL, TEXT, TEXT_FIRST, WIDTH,
    )  # fmt: skip
    raw = _raw(defects, pid * k_blocks + column, column < k_blocks, 3)
    tl.store(tops + pid, tl.max(tl.where(candidate & (forced == 0), raw, 0), 0))
    bins: tl.constexpr = (1 << (BITS - SHIFT)) + (1 << SHIFT) + 1
    at = tl.program_id(0) % q_blocks * SHARE + tl.arange(0, SHARE)
    tl.store(found + pid // q_blocks * bins + at, tl.zeros_like(at), mask=at < bins)


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
    SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    IS_LOW: tl.constexpr,
):
    """What a row saves at each lambda, added to its head's histogram.

    found `[B * H, high bins + low bins + 1]`; the last is the cost at lambda 0, which the first of
    the two launches adds up too.
    """
    HIGH: tl.constexpr = 1 << (BITS - SHIFT)
    LOW: tl.constexpr = 1 << SHIFT
    pid = tl.program_id(0).to(tl.int64)
    head = pid // q_blocks
    column = tl.arange(0, WIDTH)
    candidate, forced = _kinds(
        tl.program_id(0) % q_blocks, k_blocks, q_len, kv_len, text_length, sink_blocks,
        BLOCK_M, BLOCK_N, IS_CAUSAL, TEXT, TEXT_FIRST, WIDTH,
    )  # fmt: skip
    free = candidate & (forced == 0)
    rows = tl.arange(0, ROWS)
    top = tl.max(tl.load(tops + head * q_blocks + rows, mask=rows < q_blocks, other=0), 0)
    found += head * (HIGH + LOW + 1)
    wanted_bin = 0
    if IS_LOW:
        over = tl.load(found + (HIGH + LOW)) - limit
        wanted_bin, _ = _crossing(found, over, HIGH)
    two, four, eight, rest = _integers(
        defects, pid * k_blocks + column, column < k_blocks, top, BITS
    )
    level, price = _best(0, two, four, eight, rest, BLOCK_N, REST, HAS_2, HAS_4, HAS_8)
    if IS_LOW == 0:
        cost = tl.where(free, price, tl.where(forced, BLOCK_N, 0))
        tl.atomic_add(found + (HIGH + LOW), tl.sum(cost, 0), sem="relaxed")
    never = tl.full([WIDTH], 0x7FFFFFFF, tl.int32)
    of_1, of_2, of_4, of_8 = _next_changes(
        two, four, eight, rest, BLOCK_N, REST, HAS_2, HAS_4, HAS_8
    )
    least = tl.zeros_like(price)
    for _ in tl.static_range(4):
        change = tl.where(level == 8, of_8, never)
        change = tl.where(level == 4, of_4, change)
        change = tl.where(level == 2, of_2, change)
        change = tl.where(level == 1, of_1, change)
        # At 2^BITS every block has changed for the last time; that end needs no count.
        moved = free & (change < (1 << BITS))
        at = tl.where(moved, change, 0)
        next_level, next_price = _best(
            at, two, four, eight, rest, BLOCK_N, REST, HAS_2, HAS_4, HAS_8
        )
        saved = tl.where(moved, price - next_price, 0)
        of_bin = at >> SHIFT
        if IS_LOW:
            counts = moved & (of_bin == wanted_bin)
            tl.atomic_add(found + HIGH + (at & (LOW - 1)), saved, mask=counts, sem="relaxed")
        else:
            # Most changes are in the first bin: one sum a row instead of an addition each.
            least += tl.where(of_bin == 0, saved, 0)
            tl.atomic_add(found + of_bin, saved, mask=moved & (of_bin > 0), sem="relaxed")
        price = tl.where(moved, next_price, price)
        level = tl.where(moved, next_level, level)
    if IS_LOW == 0:
        tl.atomic_add(found, tl.sum(least, 0), sem="relaxed")


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
    SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Levels of one row at the lambda of its head."""
    HIGH: tl.constexpr = 1 << (BITS - SHIFT)
    LOW: tl.constexpr = 1 << SHIFT
    pid = tl.program_id(0).to(tl.int64)
    head = pid // q_blocks
    column = tl.arange(0, WIDTH)
    inside = column < k_blocks
    candidate, forced = _kinds(
        tl.program_id(0) % q_blocks, k_blocks, q_len, kv_len, text_length, sink_blocks,
        BLOCK_M, BLOCK_N, IS_CAUSAL, TEXT, TEXT_FIRST, WIDTH,
    )  # fmt: skip
    rows = tl.arange(0, ROWS)
    top = tl.max(tl.load(tops + head * q_blocks + rows, mask=rows < q_blocks, other=0), 0)
    found += head * (HIGH + LOW + 1)
    over = tl.load(found + (HIGH + LOW)) - limit
    high, before = _crossing(found, over, HIGH)
    low, _ = _crossing(found + HIGH, over - before, LOW)
    lam = tl.where(high < HIGH, (high << SHIFT) + low, 1 << BITS)
    lam = tl.where(over > 0, lam, 0)
    at = pid * k_blocks + column
    two, four, eight, rest = _integers(defects, at, inside, top, BITS)
    level, _ = _best(lam, two, four, eight, rest, BLOCK_N, REST, HAS_2, HAS_4, HAS_8)
    defect = tl.load(defects + at * 4 + 3, mask=inside, other=0.0)
    raw = _raw(defects, at, inside, 3)
    _store_levels(levels, at, level, raw, defect != defect, candidate, forced, inside)


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
    candidate, forced = _kinds(
        tl.program_id(0) % q_blocks, k_blocks, q_len, kv_len, text_length, sink_blocks,
        BLOCK_M, BLOCK_N, IS_CAUSAL, TEXT, TEXT_FIRST, WIDTH,
    )  # fmt: skip
    free = candidate & (forced == 0)
    at = pid * k_blocks + column
    raw = _raw(defects, at, inside, 3)
    top = tl.max(tl.where(free, raw, 0), 0)
    two, four, eight, rest = _integers(defects, at, inside, top, BITS)
    n = tl.sum(candidate.to(tl.int32), 0)
    limit = tl.floor(n.to(tl.float64) * SHARE).to(tl.int32)
    low = n * 0
    high = low + (1 << BITS)
    for _ in tl.range(BITS + 1):
        middle = (low + high) >> 1
        _, price = _best(middle, two, four, eight, rest, BLOCK_N, REST, HAS_2, HAS_4, HAS_8)
        cost = tl.sum(tl.where(free, price, tl.where(forced, BLOCK_N, 0)), 0)
        fits = cost <= limit
        low = tl.where(fits, low, tl.minimum(middle + 1, high))
        high = tl.where(fits, middle, high)
    level, _ = _best(high, two, four, eight, rest, BLOCK_N, REST, HAS_2, HAS_4, HAS_8)
    defect = tl.load(defects + at * 4 + 3, mask=inside, other=0.0)
    _store_levels(levels, at, level, raw, defect != defect, candidate, forced, inside)
