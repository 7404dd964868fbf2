"""What selection asks of the blocks of one row, however their levels are chosen (specification,
section 6): which may be chosen, which must be, how they rank, and that no row is left empty.

Functions of kernels; a program holds one row of blocks.
"""

import triton
import triton.language as tl

UNSEEN = tl.constexpr(-2)
"""Rank key of a block that cannot be seen."""


@triton.jit
def row_span(row, q_len, kv_len, BLOCK_M: tl.constexpr, IS_CAUSAL: tl.constexpr):
    """First and last query of a row; under causality their positions among the keys."""
    first = row * BLOCK_M
    last = tl.minimum(first + BLOCK_M, q_len) - 1
    if IS_CAUSAL:
        first += kv_len - q_len
        last += kv_len - q_len
    return first, last


@triton.jit
def candidate_blocks(
    last, k_blocks, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr, WIDTH: tl.constexpr
):
    """Which blocks hold a key that the row, whose last query is `last`, can see."""
    column = tl.arange(0, WIDTH)
    candidate = column < k_blocks
    if IS_CAUSAL:
        candidate = candidate & (column * BLOCK_N <= last)
    return candidate


@triton.jit
def forced_blocks(
    first,
    last,
    q_len,
    kv_len,
    text_length,
    sink_blocks,
    BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    TEXT: tl.constexpr,
    TEXT_FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Which blocks have level 1 if they are candidates: text, sinks, and what the diagonal cuts."""
    first_key = tl.arange(0, WIDTH) * BLOCK_N
    last_key = tl.minimum(first_key + BLOCK_N, kv_len) - 1
    forced = tl.arange(0, WIDTH) < sink_blocks
    if TEXT:
        if TEXT_FIRST:
            forced = forced | (first < text_length) | (first_key < text_length)
        else:
            text_from = (kv_len if IS_CAUSAL else q_len) - text_length
            forced = forced | (last >= text_from) | (last_key >= kv_len - text_length)
    if IS_CAUSAL:
        # Some row sees some but not all keys of the block.
        forced = forced | (tl.maximum(first, first_key) <= tl.minimum(last, last_key - 1))
    return forced


@triton.jit
def ordered_bits(score):
    """Bits of scores, which order like the scores; NaN and negative ones give 0."""
    return tl.where(score > 0, score, 0.0).to(tl.int32, bitcast=True)


@triton.jit
def rank_keys(score, candidate):
    """Integers by which the blocks of a row rank: NaN stands behind every score, blocks that cannot
    be seen behind NaN."""
    key = tl.where(score != score, -1, ordered_bits(score))
    return tl.where(candidate, key, UNSEEN)


@triton.jit
def store_levels(pointer, at, level, key, forced, inside):
    """Levels of a row; one left without any gets level 1 on its block of rank 0.

    key: from `rank_keys`, which also says which blocks are candidates.
    """
    column = tl.arange(0, level.shape[0])
    level = tl.where(forced, 1, level)
    level = tl.where(key > UNSEEN, level, 0)
    if tl.max(level, 0) == 0:
        best = tl.min(tl.where(key == tl.max(key, 0), column, level.shape[0]), 0)
        level = tl.where(column == best, 1, level)
    tl.store(pointer + at, level, mask=inside)
