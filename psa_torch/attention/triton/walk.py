"""Device functions that every kernel here shares: where pyramid rows lie and what they cover.

Levels are written as exponents: `g` is 0, 1, 2, 3 for levels 1, 2, 4, 8. The rows of one level
that a table row selects form a stream, block after block; a tile takes `TILE` consecutive
positions of one stream, so its log-count bias is the scalar `g` (in base 2) except where a
ragged block ends. Full tiles hold only blocks that need no mask. What is left of the streams,
remainders and masked blocks alike, is laid end to end and walked by tail tiles of `TAIL`
positions, with the level, the count and the visibility of each position by arithmetic.
"""

from typing import NamedTuple

import triton
import triton.language as tl


@triton.jit
def select4(g, x0, x1, x2, x3):
    """`(x0, x1, x2, x3)[g]` without a branch."""
    return tl.where(g == 0, x0, tl.where(g == 1, x1, tl.where(g == 2, x2, x3)))


@triton.jit
def place_of_item(item, q_blocks, heads, group, IS_CAUSAL: tl.constexpr):
    """(query block, batch and head, batch and key head) of an item of work.

    The blocks of a head are neighbours, so that programs share its pyramid in L2. Under
    causality the last blocks see most: they come first.
    """
    block = item % q_blocks
    if IS_CAUSAL:
        block = q_blocks - 1 - block
    batch_head = item // q_blocks
    kv_head = (batch_head // heads).to(tl.int64) * (heads // group) + batch_head % heads // group
    return block, batch_head, kv_head


@triton.jit
def level_start(padded_len, g):
    """First pyramid row of level `2**g`."""
    return 2 * padded_len - ((2 * padded_len) >> g)


@triton.jit
def load4(pointer, row):
    """The four int32 numbers of one row of a `[..., 4]` array."""
    pointer += tl.cast(row, tl.int64) * 4
    return tl.load(pointer), tl.load(pointer + 1), tl.load(pointer + 2), tl.load(pointer + 3)


@triton.jit
def in_full_tiles(unmasked, LOG_BLOCK_N: tl.constexpr, TILE: tl.constexpr):
    """Positions of each level that full tiles take: whole tiles of its unmasked blocks, of which
    there are four numbers."""
    u0, u1, u2, u3 = unmasked
    return (
        (u0 << LOG_BLOCK_N) // TILE * TILE,
        (u1 << (LOG_BLOCK_N - 1)) // TILE * TILE,
        (u2 << (LOG_BLOCK_N - 2)) // TILE * TILE,
        (u3 << (LOG_BLOCK_N - 3)) // TILE * TILE,
    )


@triton.jit
def tile_ends(done, TILE: tl.constexpr):
    """Running ends of the full tiles of each level, from the positions that they take."""
    done0, done1, done2, done3 = done
    end0 = done0 // TILE
    end1 = end0 + done1 // TILE
    end2 = end1 + done2 // TILE
    return end0, end1, end2, end2 + done3 // TILE


@triton.jit
def gather_rows(entries, level_entry, position, g, padded_len, LOG_BLOCK_N: tl.constexpr):
    """Pyramid rows at positions of a level's stream; `level_entry` is its first place in entries.

    `g` is one level or one per position.
    """
    shift = LOG_BLOCK_N - g
    block = tl.load(entries + (level_entry + (position >> shift)))
    return level_start(padded_len, g) + (block << shift) + (position & ((1 << shift) - 1))


@triton.jit
def tail_rows(entries, x, counts, done, padded_len, kv_len, LOG_BLOCK_N: tl.constexpr):
    """Positions `x` of what full tiles left over, all levels end to end.

    counts, done: of each level, blocks of the table row and positions in full tiles.

    Returns:
        The pyramid row of each position, the last key it covers, and its log2 count; that is
        -inf where there is no row or the row covers no key.
    """
    n0, n1, n2, n3 = counts
    done0, done1, done2, done3 = done
    end0 = (n0 << LOG_BLOCK_N) - done0
    end1 = end0 + (n1 << (LOG_BLOCK_N - 1)) - done1
    end2 = end1 + (n2 << (LOG_BLOCK_N - 2)) - done2
    end3 = end2 + (n3 << (LOG_BLOCK_N - 3)) - done3
    inside = x < end3
    x = tl.minimum(x, end3 - 1)
    g = (x >= end0).to(tl.int32) + (x >= end1).to(tl.int32) + (x >= end2).to(tl.int32)
    position = x + select4(g, done0, done1 - end0, done2 - end1, done3 - end2)
    level_entry = select4(g, 0, n0, n0 + n1, n0 + n1 + n2)
    rows = gather_rows(entries, level_entry, position, g, padded_len, LOG_BLOCK_N)
    first_key = (rows - level_start(padded_len, g)) << g
    last = tl.minimum(first_key + (1 << g), kv_len) - 1
    count = last + 1 - first_key
    bias = tl.math.log2(tl.maximum(count, 1).to(tl.float32))
    return rows, last, tl.where(inside & (count > 0), bias, float("-inf"))


@triton.jit
def tail_length(counts, done, LOG_BLOCK_N: tl.constexpr):
    """Positions that full tiles left over."""
    n0, n1, n2, n3 = counts
    done0, done1, done2, done3 = done
    stream = (n0 << LOG_BLOCK_N) + (n1 << (LOG_BLOCK_N - 1))
    stream += (n2 << (LOG_BLOCK_N - 2)) + (n3 << (LOG_BLOCK_N - 3))
    return stream - (done0 + done1 + done2 + done3)


class RowStream(NamedTuple):
    """What one table row says of its streams.

    Attributes:
        counts: blocks of each level.
        done: positions of each level in full tiles.
    """

    counts: object
    done: object


@triton.jit
def open_row(counts, full_counts, row, LOG_BLOCK_N: tl.constexpr, TILE: tl.constexpr):
    """The `RowStream` of row `row` of a table."""
    n = load4(counts, row)
    return RowStream(n, in_full_tiles(load4(full_counts, row), LOG_BLOCK_N, TILE))


@triton.jit
def tail_tiles(stream, LOG_BLOCK_N: tl.constexpr, TILE: tl.constexpr):
    """Tiles of what full tiles left over."""
    return (tail_length(stream.counts, stream.done, LOG_BLOCK_N) + TILE - 1) // TILE
