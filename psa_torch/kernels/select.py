"""Scores to levels, one kernel program a row (specification, section 6).

A program holds one row of scores as ordered integers and never sorts it. Selection only asks
which blocks stand before a few end ranks, and each end rank is found by bisection on the values,
which stops as soon as a value splits the row at the right rank. `thresholdbound` first finds how
many ranks lie inside each bound, by bisection on the integer scores with sums instead of counts;
blocks of equal score add equal amounts, so a tie is resolved by one division. Ties at an end rank
go to the lower index by a running count.

Counts at 591 x 1,182 blocks, 24 heads (14,184 rows of 2,048 keys, 16 a lane): a step is some 60
instructions in each of 4 warps; distinct scores take about log2(Nk) + 2 = 12 steps an end, four
ends 12,000 warp instructions a row, 0.2 ms on 132 processors; `thresholdbound` about twice that.
A bitonic sort of 2,048 (score, index) pairs is 66 exchange stages of 64-bit shuffles, about 40,000.
Bytes: scores 67 MB read, levels 67 MB written, 0.03 ms at 4.8 TB/s.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from psa_torch._checks import describe
from psa_torch._triton.launch import launch_kernel
from psa_torch.kernels._launch import next_power_of_2, on_device_of
from psa_torch.kernels.blocks import (
    UNSEEN,
    candidate_blocks,
    forced_blocks,
    rank_keys,
    row_span,
    store_levels,
)
from psa_torch.kernels.table import warps_for_row
from shared_specs.config import PSAConfig
from shared_specs.selection import check_scores


def select_levels(
    scores: Tensor,
    config: PSAConfig,
    *,
    q_len: int,
    kv_len: int,
    cap: Tensor | None = None,
) -> Tensor:
    """Levels of every (query block, key block) pair.

    Args:
        scores: float32 `[B, H, Nq, Nk]`, any strides, at least 0; a negative score counts as 0,
            NaN ranks last.
        config: ratios, mode, and the text, sink and causal rules.
        q_len, kv_len: tokens; `Nq = ceil(q_len / block_m)`, `Nk = ceil(kv_len / block_n)`.
        cap: int32 `[B, Hk, Nk]` from `similarity_cap`, `H % Hk == 0`, or None.

    Returns:
        int32 `[B, H, Nq, Nk]`, contiguous, values in {0, 1, 2, 4, 8}, at least one above 0 in
        every row.

    Raises:
        TypeError: scores are not float32, or the cap does not hold integers.
        ValueError: shapes do not fit the lengths.
    """
    described = None if cap is None else describe("cap", cap)
    check_scores(describe("scores", scores), described, config, q_len, kv_len)
    batch, heads, nq, nk = scores.shape
    cap = None if cap is None else cap.contiguous()
    levels = scores.new_empty(batch, heads, nq, nk, dtype=torch.int32)
    width = max(32, next_power_of_2(nk))
    with on_device_of(scores):
        launch_kernel(
            _select_kernel,
            (batch * heads * nq,),
            scores,
            cap,
            levels,
            *scores.stride(),
            heads,
            1 if cap is None else heads // cap.shape[1],
            nq,
            nk,
            q_len,
            kv_len,
            config.text_length,
            config.sink_blocks,
            **_steps(config)._asdict(),
            MIN_FULL=config.min_full_ratio,
            THRESHOLD=config.mask_mode == "thresholdbound",
            SHIFT=30 - (nk - 1).bit_length(),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            IS_CAUSAL=config.causal,
            TEXT=config.text_length > 0,
            TEXT_FIRST=config.text_position == "start",
            WIDTH=width,
            num_warps=warps_for_row(width),
        )
    return levels


class _Steps(NamedTuple):
    """What selection takes one after the other: constants of the kernel, one entry a level."""

    TAKEN: tuple[int, ...]
    SHARES: tuple[float, ...]
    BOUNDS: tuple[float, ...]
    MERGES: tuple[int, ...]


@functools.lru_cache(maxsize=64)
def _steps(config: PSAConfig) -> _Steps:
    """Kept per configuration: they took a sixth of what selection takes on the host."""
    steps = list(config.ratio_ends)
    while steps and steps[-1][0] == 0:  # what is left over is skipped anyway
        steps.pop()
    return _Steps(
        TAKEN=tuple(level for level, _ in steps),
        SHARES=tuple(end for _, end in steps),
        BOUNDS=tuple(float(np.float32(end + 1e-6)) for _, end in steps),
        MERGES=tuple(config.merge(level) for level, _ in steps),
    )


@triton.jit
def _select_kernel(
    scores,
    cap,
    levels,
    stride_b,
    stride_h,
    stride_row,
    stride_column,
    heads,
    group,
    q_blocks,
    k_blocks,
    q_len,
    kv_len,
    text_length,
    sink_blocks,
    TAKEN: tl.constexpr,
    SHARES: tl.constexpr,
    BOUNDS: tl.constexpr,
    MERGES: tl.constexpr,
    MIN_FULL: tl.constexpr,
    THRESHOLD: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    TEXT: tl.constexpr,
    TEXT_FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Grid: batch * heads * query blocks.

    TAKEN, SHARES, BOUNDS, MERGES: level, end ratio, float32 bound and blocks per tile of each
    step, in the order taken.
    """
    pid = tl.program_id(0)
    row = pid % q_blocks
    batch_head = (pid // q_blocks).to(tl.int64)
    b = batch_head // heads
    h = batch_head % heads
    column = tl.arange(0, WIDTH)
    inside = column < k_blocks
    first, last = row_span(row, q_len, kv_len, BLOCK_M, IS_CAUSAL)
    candidate = candidate_blocks(last, k_blocks, BLOCK_N, IS_CAUSAL, WIDTH)
    n = tl.sum(candidate.to(tl.int32), 0)

    scores += b * stride_b + h * stride_h + row.to(tl.int64) * stride_row
    score = tl.load(scores + column.to(tl.int64) * stride_column, mask=inside, other=0.0)
    key = rank_keys(score, candidate)

    u = key
    total = n
    if THRESHOLD:
        u = _integer_scores(key, SHIFT)
        total = tl.sum(u, 0)
    level = tl.full([WIDTH], -1, tl.int32)
    least = tl.min(tl.where(key > UNSEEN, key, 0x7FFFFFFF), 0)
    ceiling = tl.max(key, 0) + 1
    end = n * 0
    for step in tl.static_range(len(TAKEN)):
        if THRESHOLD:
            end = _threshold_end(
                u, total, n, end, BOUNDS[step], MERGES[step], TAKEN[step] == 1, MIN_FULL
            )
        else:
            end = _topk_end(n, end, SHARES[step], MERGES[step])
        value = _value_at_rank(key, end, least, ceiling)
        leading = _leading_ranks(key, end, value)
        level = tl.where((level < 0) & leading, TAKEN[step], level)
        ceiling = tl.minimum(ceiling, value + 1)  # ends do not decrease
    level = tl.maximum(level, 0)

    if cap is not None:
        at = (b * (heads // group) + h // group) * k_blocks + column
        level = tl.minimum(level, tl.load(cap + at, mask=inside, other=0))
    at = pid.to(tl.int64) * k_blocks + column
    forced = forced_blocks(
        first, last, q_len, kv_len, text_length, sink_blocks,
        BLOCK_N, IS_CAUSAL, TEXT, TEXT_FIRST, WIDTH,
    )  # fmt: skip
    store_levels(levels, at, level, key, forced, inside)


@triton.jit
def _value_at_rank(key, end, least, ceiling):
    """The largest value that at least `end` keys reach, or a lower one that exactly `end` reach.

    Args:
        key: int32 `[WIDTH]`.
        end: scalar; if it is 0 the answer is `ceiling`.
        least: a value that at least `end` keys reach.
        ceiling: a value above `least` that fewer than `end` keys reach.
    """
    low = tl.where(end > 0, least, ceiling)
    high = ceiling
    while high - low > 1:
        middle = low + (high - low) // 2
        reached = tl.sum((key >= middle).to(tl.int32), 0)
        low = tl.where(reached >= end, middle, low)
        high = tl.where(reached > end, high, middle)
    return low


@triton.jit
def _leading_ranks(key, end, value):
    """Whether each block is among the first `end` by descending key, ties by ascending index."""
    above = key > value
    tied = key == value
    wanted = end - tl.sum(above.to(tl.int32), 0)
    return above | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= wanted))


@triton.jit
def _integer_scores(key, SHIFT: tl.constexpr):
    """floor(score * 2^(SHIFT - x)), 2^x the smallest power of two that no score exceeds.

    From the bits of the scores, by shifts of their mantissas. NaN and unseen blocks give 0, an
    infinite score counts as the largest finite one.
    """
    bits = tl.minimum(tl.maximum(key, 0), 0x7F7FFFFF)
    largest = tl.max(bits, 0)
    # value = mantissa * 2^exponent with an integer mantissa
    exponent = tl.maximum(bits >> 23, 1) - 150
    mantissa = (bits & 0x7FFFFF) | tl.where(bits >> 23 > 0, 1 << 23, 0)
    top_exponent = tl.maximum(largest >> 23, 1) - 150
    top_mantissa = (largest & 0x7FFFFF) | tl.where(largest >> 23 > 0, 1 << 23, 0)
    # Integers below 2^24 are exact in float32: its exponent field is the integer's bit length.
    as_float = top_mantissa.to(tl.float32).to(tl.int32, bitcast=True)
    x = top_exponent + (as_float >> 23) - 127 + ((as_float & 0x7FFFFF) != 0).to(tl.int32)
    left = exponent + SHIFT - x
    right = tl.minimum(tl.maximum(-left, 0), 31)
    left = tl.minimum(tl.maximum(left, 0), 30)
    return tl.where(mantissa == 0, 0, (mantissa << left) >> right)


@triton.jit
def _topk_end(n, last, SHARE: tl.constexpr, MERGE: tl.constexpr):
    """End rank from a share of the number of candidates, in float64 as the rule says."""
    end = tl.minimum(n, (n.to(tl.float64) * SHARE).to(tl.int32))
    if MERGE > 1:
        end = tl.where(end > last, _whole_tiles(end - last, last, n, MERGE), end)
    return tl.maximum(end, last)


@triton.jit
def _threshold_end(
    u,
    total,
    n,
    last,
    BOUND: tl.constexpr,
    MERGE: tl.constexpr,
    FINEST: tl.constexpr,
    MIN_FULL: tl.constexpr,
):
    """End rank from a share of the row's cumulative integer score."""
    bound = tl.floor(total.to(tl.float32) * BOUND).to(tl.int32)
    inside = n
    if total > bound:
        inside = _ranks_within(u, total, bound)
    end = tl.where(inside > 0, inside + 1, last)  # the block that crosses is included
    if MERGE > 1:
        end = _whole_tiles(tl.maximum(end - last, 0), last, n, MERGE)
    else:
        end = tl.minimum(end, n)
    end = tl.maximum(end, last)
    if FINEST and MERGE == 1:
        end = tl.maximum(end, tl.minimum(n, (n.to(tl.float64) * MIN_FULL).to(tl.int32) + 1))
    return end


@triton.jit
def _ranks_within(u, total, bound):
    """How many leading ranks have a cumulative `u` of at most `bound`, where total > bound."""
    # Blocks at or above `low` sum to more than the bound, those at or above `high` do not.
    low = bound * 0 + 1
    high = tl.max(u, 0) + 1
    low_sum = total
    high_sum = bound * 0
    # Done when only one block, or only blocks of one value, lie between.
    while (high - low > 1) & (low_sum - high_sum >= 2 * low):
        middle = low + (high - low) // 2
        reached = tl.sum(tl.where(u >= middle, u, 0), 0)
        more = reached > bound
        low = tl.where(more, middle, low)
        low_sum = tl.where(more, reached, low_sum)
        high = tl.where(more, high, middle)
        high_sum = tl.where(more, high_sum, reached)
    one = low_sum - high_sum < 2 * low
    return tl.sum((u >= high).to(tl.int32), 0) + tl.where(one, 0, (bound - high_sum) // low)


@triton.jit
def _whole_tiles(count, last, n, MERGE: tl.constexpr):
    """End rank when `count` blocks are rounded up to whole tiles; down where they pass `n`."""
    end = tl.minimum(last + tl.cdiv(count, MERGE) * MERGE, n)
    return tl.where(end == n, last + (n - last) // MERGE * MERGE, end)
