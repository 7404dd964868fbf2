"""Those who copy keys, or values, for the forward and dq: pyramid rows into a ring of tiles."""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from psa_torch._triton.boxes import row_boxes
from psa_torch._triton.gluon import copy_async, load_async
from psa_torch._triton.rings import stage_of, wait_empty
from psa_torch.attention.triton.rows import Rows
from psa_torch.attention.triton.walk import (
    gather_rows,
    open_row,
    place_of_item,
    tail_rows,
    tail_tiles,
    tile_ends,
)

COPY_WARPS = gl.constexpr(2)
"""Warps that copy keys, and as many that copy values. Together they are one warpgroup, of which
the hardware assigns registers; and the fewer wait, the less they take from those who compute."""

COPY_THREADS = gl.constexpr(32 * COPY_WARPS.value)


class Sizes(NamedTuple):
    """Numbers of one call, as the kernels of `forward` and `query_gradient` have them."""

    heads: object
    group: object
    q_len: object
    kv_len: object
    padded_len: object
    q_blocks: object
    k_blocks: object
    items: object


class Lists(NamedTuple):
    """Pointers to the table (see `plan.Plan`)."""

    entries: object
    counts: object
    full_counts: object


class Queries(NamedTuple):
    """Queries that are copied: their pointer, its strides, and a ring with two places for each
    query block of two."""

    pointer: object
    stride_b: object
    stride_h: object
    stride_m: object
    ring: object


class Source(NamedTuple):
    """Where the keys, or the values, of all heads are (see `rows.Rows`).

    Attributes:
        pointer: rows of level 1.
        pooled: rows of the other levels.
        apart: rows of memory from the one to the other. Where both are in one tile, this and not
            a choice between pointers, through which the compiler would not see that addresses are
            multiples of the 16 bytes that a copy needs.
        long, half: see `boxes`.
        key_rows, pooled_rows: rows of a head in either.
        skipped: pyramid rows that the pooled ones leave out at the start.
    """

    pointer: object
    pooled: object
    apart: object
    long: object
    half: object
    key_rows: object
    pooled_rows: object
    skipped: object


@gluon.jit
def copy_columns(target, pointer, d, D: gl.constexpr):
    """`copy_async`, with zeros in columns from `D` on, which are not there.

    d: the column of each number, in a shape that broadcasts to that of `pointer`.
    """
    if D == target.shape[1]:
        copy_async(target, pointer)
    else:
        copy_async(target, pointer, mask=d < D)


@gluon.jit
def _head_of(source, first_key, first_pooled, D: gl.constexpr):
    """`source` for one head: pointers to pyramid row 0, and in place of rows of a head, the rows
    of the long and of the half box that are pyramid row 0."""
    return Source(
        source.pointer + first_key * D,
        source.pooled + first_pooled * D,
        source.apart + (first_pooled - first_key).to(gl.int32),
        source.long,
        source.half,
        first_key.to(gl.int32),
        first_pooled.to(gl.int32),
        source.skipped,
    )


@gluon.jit
def _copy_rows(pointer, rows, d, t, ring, D: gl.constexpr):
    """Copies rows of memory, counted from `pointer`, into the place of tile `t` once it is free."""
    stage = stage_of(ring, t)
    d = gl.expand_dims(d, 0)
    at = gl.expand_dims(rows.to(gl.int64), 1) * D + d
    wait_empty(ring, t)
    copy_columns(ring.tiles.index(stage), pointer + at, d, D)
    async_copy.mbarrier_arrive(ring.full.index(stage), increment_count=False)


@gluon.jit
def _load_boxes(
    box,
    entries,
    first_row,
    position,
    t,
    padded_len,
    ring,
    G: gl.constexpr,
    LOG_BLOCK_N: gl.constexpr,
):
    """Loads tile `t` by tensor copies, a box for each run of adjacent rows of level `2**G`.

    entries: points at the first block id of the level.
    first_row: row of the descriptor that is pyramid row 0 of this head.
    """
    BOX: gl.constexpr = box.block_shape[0]
    TILE: gl.constexpr = ring.tiles.shape[1]
    BYTES: gl.constexpr = TILE * ring.tiles.shape[2] * 2
    stage = stage_of(ring, t)
    rows = ()
    for j in gl.static_range(TILE // BOX):
        row = gather_rows(entries, 0, position + j * BOX, G, padded_len, LOG_BLOCK_N)
        rows = rows + (first_row + row,)
    # The bytes count as the arrival of one thread; the others have nothing to wait for.
    wait_empty(ring, t)
    mbarrier.expect(ring.full.index(stage), BYTES)
    for j in gl.static_range(TILE // BOX):
        target = ring.tiles.index(stage).slice(j * BOX, BOX)
        load_async(box, [rows[j], 0], ring.full.index(stage), target)
    mbarrier.arrive(ring.full.index(stage), count=COPY_THREADS - 1)


@gluon.jit
def _copy_tiles(head, listed, sizes, copied, ring, D: gl.constexpr, LOG_BLOCK_N: gl.constexpr):
    """The tiles of one table row, of which `copied` others went through the ring before.

    Full tiles of levels 1 and 2 are few long runs, which tensor copies bring; other rows are
    gathered one by one.

    Args:
        head: a `Source`, by `_head_of`.

    Returns:
        Tiles of this table row.
    """
    TILE: gl.constexpr = ring.tiles.shape[1]
    WIDTH: gl.constexpr = ring.tiles.shape[2]
    layout: gl.constexpr = gl.BlockedLayout(
        [1, 8], [256 // WIDTH, WIDTH // 8], [COPY_WARPS, 1], [1, 0]
    )
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    padded_len = sizes.padded_len
    entries, counts, full_counts = listed
    stream = open_row(counts, full_counts, 0, LOG_BLOCK_N, TILE)
    n0, n1, n2, n3 = stream.counts
    # One position a thread while rows are looked up; every thread that copies gets them after.
    lane = gl.arange(0, TILE, gl.BlockedLayout([1], [32], [COPY_WARPS], [0]))
    d = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    end0, end1, end2, end3 = tile_ends(stream.done, TILE)
    for t in range(end0):
        _load_boxes(
            head.long,
            entries,
            head.key_rows,
            t * TILE,
            copied + t,
            padded_len,
            ring,
            0,
            LOG_BLOCK_N,
        )
    for t in range(end0, end1):
        _load_boxes(
            head.half,
            entries + n0,
            head.pooled_rows,
            (t - end0) * TILE,
            copied + t,
            padded_len,
            ring,
            1,
            LOG_BLOCK_N,
        )
    for t in range(end1, end3):
        g = 2 + (t >= end2).to(gl.int32)
        level_entry = n0 + n1 + gl.where(g == 2, 0, n2)
        position = (t - gl.where(g == 2, end1, end2)) * TILE + lane
        rows = gather_rows(entries, level_entry, position, g, padded_len, LOG_BLOCK_N)
        rows = gl.convert_layout(rows, row_layout)
        _copy_rows(head.pooled, rows, d, copied + t, ring, D)
    tail = tail_tiles(stream, LOG_BLOCK_N, TILE)
    for i in range(tail):
        rows, last, bias = tail_rows(
            entries,
            i * TILE + lane,
            stream.counts,
            stream.done,
            padded_len,
            sizes.kv_len,
            LOG_BLOCK_N,
        )
        # A row that is not there has weight 0; any real one stands in for it.
        rows = gl.where(bias > float("-inf"), rows, 0)
        rows += gl.where(rows < padded_len, 0, head.apart)
        rows = gl.convert_layout(rows, row_layout)
        _copy_rows(head.pointer, rows, d, copied + end3 + i, ring, D)
    return end3 + tail


@gluon.jit
def _copy_queries(queries, sizes, block, batch_head, taken, D: gl.constexpr):
    """Copies the `taken`-th query block of the program, half for each multiplying warpgroup."""
    tiles = queries.ring.tiles
    ROWS: gl.constexpr = tiles.shape[1]
    WIDTH: gl.constexpr = tiles.shape[2]
    layout: gl.constexpr = gl.BlockedLayout(
        [1, 8], [256 // WIDTH, WIDTH // 8], [COPY_WARPS, 1], [1, 0]
    )
    d = gl.expand_dims(gl.arange(0, WIDTH, gl.SliceLayout(0, layout)), 0)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    head = queries.pointer + (batch_head // sizes.heads).to(gl.int64) * queries.stride_b
    head += (batch_head % sizes.heads).to(gl.int64) * queries.stride_h
    wait_empty(queries.ring, taken)
    for part in gl.static_range(2):
        # Past the last query any real one will do: what comes of it is not stored.
        m = gl.minimum(block * (2 * ROWS) + part * ROWS + row, sizes.q_len - 1).to(gl.int64)
        at = gl.expand_dims(m * queries.stride_m, 1) + d
        copy_columns(tiles.index(taken % 2 * 2 + part), head + at, d, D)
    async_copy.mbarrier_arrive(
        queries.ring.full.index(stage_of(queries.ring, taken)), increment_count=False
    )


@gluon.jit
def copy_items(
    queries,
    source,
    lists,
    sizes,
    ring,
    D: gl.constexpr,
    LOG_BLOCK_N: gl.constexpr,
    IS_CAUSAL: gl.constexpr,
):
    """Those who copy: the keys or the values of each query block, and its queries if they are
    given (else None). D: numbers of a row, of which a tile may have more."""
    copied = 0
    taken = 0
    for item in range(gl.program_id(0), sizes.items, gl.num_programs(0)):
        block, batch_head, kv_head = place_of_item(
            item, sizes.q_blocks, sizes.heads, sizes.group, IS_CAUSAL
        )
        if queries is not None:
            _copy_queries(queries, sizes, block, batch_head, taken, D)
        taken += 1
        first_key = kv_head * source.key_rows
        first_pooled = kv_head * source.pooled_rows - source.skipped
        row = (batch_head * sizes.q_blocks + block).to(gl.int64)
        head = _head_of(source, first_key, first_pooled, D)
        listed = Lists(
            lists.entries + row * sizes.k_blocks,
            lists.counts + row * 4,
            lists.full_counts + row * 4,
        )
        copied += _copy_tiles(head, listed, sizes, copied, ring, D, LOG_BLOCK_N)


def boxes(rows: Rows, block_n: int, tile: int, width: int) -> tuple[TensorDescriptor, ...]:
    """Descriptors (k_long, k_half, v_long, v_half) of the rows of all heads as one matrix.

    A long box is the rows of a block of level 1, a half box those of level 2, or a tile if that
    is smaller.
    """
    long, half = (min(block_n >> g, tile) for g in (0, 1))
    return (
        row_boxes(rows.k, long, width),
        row_boxes(rows.pooled_k, half, width),
        row_boxes(rows.v, long, width),
        row_boxes(rows.pooled_v, half, width),
    )
