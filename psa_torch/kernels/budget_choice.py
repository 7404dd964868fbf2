"""What the kernels of `budget` ask of blocks: what each loses, and what is best.

Functions of kernels; a program holds one row of blocks.
"""

import triton
import triton.language as tl

from psa_torch.kernels.blocks import candidate_blocks, forced_blocks, ordered_bits, row_span


@triton.jit
def kinds_of_blocks(
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
    first, last = row_span(row, q_len, kv_len, BLOCK_M, IS_CAUSAL)
    candidate = candidate_blocks(last, k_blocks, BLOCK_N, IS_CAUSAL, WIDTH)
    forced = forced_blocks(
        first, last, q_len, kv_len, text_length, sink_blocks,
        BLOCK_N, IS_CAUSAL, TEXT, TEXT_FIRST, WIDTH,
    )  # fmt: skip
    return candidate, forced & candidate


@triton.jit
def raw_bits(pointer, at, inside, LEVEL: tl.constexpr):
    """Bits of the defects of one level."""
    return ordered_bits(tl.load(pointer + at * 4 + LEVEL, mask=inside, other=0.0))


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
def integer_defects(pointer, at, inside, top, BITS: tl.constexpr):
    """Integer defects of levels 2, 4, 8 and the rest."""
    two = _scaled(raw_bits(pointer, at, inside, 0), top, BITS)
    four = _scaled(raw_bits(pointer, at, inside, 1), top, BITS)
    eight = _scaled(raw_bits(pointer, at, inside, 2), top, BITS)
    rest = _scaled(raw_bits(pointer, at, inside, 3), top, BITS)
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
def best_levels(
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
def next_changes(
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
def crossing(pointer, wanted, BINS: tl.constexpr):
    """The bin in which the running sum reaches `wanted`, `BINS` if none; and the sum before it."""
    sums = tl.cumsum(tl.load(pointer + tl.arange(0, BINS)), 0)
    short = sums < wanted
    return tl.sum(short.to(tl.int32), 0), tl.max(tl.where(short, sums, 0), 0)
