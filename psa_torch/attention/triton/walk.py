"""Device functions that every kernel here shares: where pyramid rows lie and what they cover.

Levels are written as exponents: `g` is 0, 1, 2, 3 for levels 1, 2, 4, 8. The rows of one level
that a table row selects form a stream, block after block; a tile takes `TILE` consecutive
positions of one stream, so its log-count bias is the scalar `g` (in base 2) except where a
ragged block ends. Full tiles hold only blocks that need no mask. What is left of each stream,
remainders and masked blocks alike, is walked by tail tiles of `TAIL` positions.
"""

import triton
import triton.language as tl


@triton.jit
def select4(g, x0, x1, x2, x3):
    """`(x0, x1, x2, x3)[g]` without a branch."""
    return tl.where(g == 0, x0, tl.where(g == 1, x1, tl.where(g == 2, x2, x3)))


@triton.jit
def level_start(padded_len, g):
    """First pyramid row of level `2**g`."""
    return 2 * padded_len - ((2 * padded_len) >> g)


@triton.jit
def load4(pointer, row):
    """The four int32 numbers of one row of a `[..., 4]` array."""
    pointer += row.to(tl.int64) * 4
    return tl.load(pointer), tl.load(pointer + 1), tl.load(pointer + 2), tl.load(pointer + 3)


@triton.jit
def full_tiles(full, g: tl.constexpr, LOG_BLOCK_N: tl.constexpr, TILE: tl.constexpr):
    """Tiles of level `2**g` that hold only rows of its `full` unmasked blocks."""
    return (full << (LOG_BLOCK_N - g)) // TILE


@triton.jit
def tail_tiles(
    count,
    full,
    g: tl.constexpr,
    LOG_BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Tiles of `TAIL` positions that the rest of the stream of level `2**g` needs."""
    done = (full << (LOG_BLOCK_N - g)) // TILE * TILE
    return ((count << (LOG_BLOCK_N - g)) - done + TAIL - 1) // TAIL


@triton.jit
def gather_rows(entries, position, g, padded_len, LOG_BLOCK_N: tl.constexpr):
    """Pyramid rows at positions of a level's stream; `entries` points at its first block id."""
    shift = LOG_BLOCK_N - g
    block = tl.load(entries + (position >> shift))
    return level_start(padded_len, g) + (block << shift) + (position & ((1 << shift) - 1))


@triton.jit
def covered(row, g, padded_len, kv_len):
    """Last key that each pyramid row covers, and how many real keys (0 or less: padding)."""
    first = (row - level_start(padded_len, g)) << g
    last = tl.minimum(first + (1 << g), kv_len) - 1
    return last, last + 1 - first
