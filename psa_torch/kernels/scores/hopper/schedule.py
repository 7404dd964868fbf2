"""What those who copy, multiply and make scores agree on: the order of work, and the slab."""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


class Sizes(NamedTuple):
    """Numbers of one call, as the kernel has them; `k_rows` are the real columns of a head."""

    heads: object
    group: object
    k_rows: object
    q_len: object
    kv_len: object
    q_blocks: object
    k_blocks: object
    row_tiles: object
    items: object


class Item(NamedTuple):
    """What a program does at a time: `ROWS` rows of one head with every key block.

    Attributes:
        block: its first query block.
        batch_head, kv_head: its head, and that of its keys, each with the batch.
        open_tiles: tiles of key blocks that every row sees whole; they come first.
        seen_tiles: tiles of which some row sees a column.
    """

    block: object
    batch_head: object
    kv_head: object
    open_tiles: object
    seen_tiles: object


class Slab(NamedTuple):
    """Where maxima pass from those who multiply to those who make scores.

    Attributes:
        maxima: pointer to the largest products of each row by key block, float32
            `[tiles, ROWS, key blocks of a tile]`, those of one item after those of another.
        tops: pointer to the largest products of each row, float32 `[2, ROWS]`: of two items.
        done: barriers for when the maxima of an item are there, by turns; each multiplying
            warpgroup arrives.
        reads: a `rings.Ring` without tiles: full when a tile of `maxima` has been read, empty when
            those who copy know it.
    """

    maxima: object
    tops: object
    done: object
    reads: object


@gluon.jit
def tiles_of(sizes, WIDTH: gl.constexpr):
    """Tiles of `WIDTH` key blocks of a head."""
    return (sizes.k_blocks + WIDTH - 1) // WIDTH


@gluon.jit
def open_item(
    item,
    sizes,
    Q_BLOCKS: gl.constexpr,
    WIDTH: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    IS_CAUSAL: gl.constexpr,
):
    """The `Item` of that number, of `Q_BLOCKS` query blocks and tiles of `WIDTH` key blocks."""
    TILE_KEYS: gl.constexpr = WIDTH * BLOCK_N
    q_len, kv_len = sizes.q_len, sizes.kv_len
    block_tiles = tiles_of(sizes, WIDTH)
    # Under causality the last rows see most: they come first.
    block = (sizes.row_tiles - 1 - item % sizes.row_tiles) * Q_BLOCKS
    batch_head = item // sizes.row_tiles
    open_tiles = block_tiles
    seen_tiles = block_tiles
    if IS_CAUSAL:
        first = block * BLOCK_M + kv_len - q_len
        last = gl.minimum((block + Q_BLOCKS) * BLOCK_M, q_len) - 1 + kv_len - q_len
        open_tiles = gl.minimum(gl.maximum(first + 1, 0) // TILE_KEYS, block_tiles)
        seen = (gl.maximum(last + 1, 0) + TILE_KEYS - 1) // TILE_KEYS
        seen_tiles = gl.minimum(seen, block_tiles)
    kv_head = (batch_head // sizes.heads) * (sizes.heads // sizes.group)
    kv_head += (batch_head % sizes.heads) // sizes.group
    return Item(block, batch_head, kv_head, open_tiles, seen_tiles)
