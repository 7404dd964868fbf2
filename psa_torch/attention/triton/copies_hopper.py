"""What the warp-specialised kernels for Hopper share: how pyramid rows get into a ring of tiles."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from psa_torch.attention.triton.rows import Rows
from psa_torch.attention.triton.walk import (
    gather_rows,
    in_full_tiles,
    load4,
    tail_length,
    tail_rows,
    tile_ends,
)
from psa_torch.kernels.boxes_hopper import row_boxes

# Renamed between Triton 3.6 and 3.9.
copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
load_async = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared

COPY_WARPS = gl.constexpr(2)
"""Warps that copy keys, and as many that copy values. Together they are one warpgroup, of which
the hardware assigns registers; and the fewer wait, the less they take from those who compute."""

COPY_THREADS = gl.constexpr(32 * COPY_WARPS.value)


@gluon.jit
def _copy_rows(pointer, rows, d, t, ring, full, empty, D: gl.constexpr, SLOTS: gl.constexpr):
    """Copies rows of memory, counted from `pointer`, into the place of tile `t` once it is free."""
    slot = t % SLOTS
    at = gl.expand_dims(rows.to(gl.int64), 1) * D + gl.expand_dims(d, 0)
    mbarrier.wait(empty.index(slot), (t // SLOTS) & 1 ^ 1)
    copy_async(ring.index(slot), pointer + at)
    async_copy.mbarrier_arrive(full.index(slot), increment_count=False)


@gluon.jit
def _load_boxes(
    box,
    entries,
    first_row,
    position,
    t,
    padded_len,
    ring,
    full,
    empty,
    G: gl.constexpr,
    LOG_BLOCK_N: gl.constexpr,
    SLOTS: gl.constexpr,
):
    """Loads tile `t` by tensor copies, a box for each run of adjacent rows of level `2**G`.

    entries: points at the first block id of the level.
    first_row: row of the descriptor that is pyramid row 0 of this head.
    """
    BOX: gl.constexpr = box.block_shape[0]
    TILE: gl.constexpr = ring.shape[1]
    BYTES: gl.constexpr = TILE * ring.shape[2] * 2
    slot = t % SLOTS
    rows = ()
    for j in gl.static_range(TILE // BOX):
        row = gather_rows(entries, 0, position + j * BOX, G, padded_len, LOG_BLOCK_N)
        rows = rows + (first_row + row,)
    # The bytes count as the arrival of one thread; the others have nothing to wait for.
    mbarrier.wait(empty.index(slot), (t // SLOTS) & 1 ^ 1)
    mbarrier.expect(full.index(slot), BYTES)
    for j in gl.static_range(TILE // BOX):
        target = ring.index(slot).slice(j * BOX, BOX)
        load_async(box, [rows[j], 0], full.index(slot), target)
    mbarrier.arrive(full.index(slot), count=COPY_THREADS - 1)


@gluon.jit
def copy_tiles(
    pointer,
    pooled,
    apart,
    long,
    half,
    first_key,
    first_pooled,
    entries,
    counts,
    full_counts,
    kv_len,
    padded_len,
    copied,
    ring,
    full,
    empty,
    D: gl.constexpr,
    LOG_BLOCK_N: gl.constexpr,
    TILE: gl.constexpr,
    SLOTS: gl.constexpr,
):
    """What those who copy do for one table row: its tiles of keys, or of values.

    Full tiles of levels 1 and 2 are few long runs, which tensor copies bring; other rows are
    gathered one by one.

    Args:
        pointer: pyramid row 0 of this head, for rows of level 1.
        pooled: the same for rows of the other levels.
        apart: rows of memory from the one to the other. Where both are in one tile, this and not
            a choice between pointers, through which the compiler would not see that addresses are
            multiples of the 16 bytes that a copy needs.
        long, half: see `boxes`.
        first_key, first_pooled: row of the long and of the half box that is pyramid row 0.
        entries, counts, full_counts: the table row.
        copied: tiles that went through the ring before.

    Returns:
        Tiles of this table row.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [COPY_WARPS, 1], [1, 0])
    n0, n1, n2, n3 = load4(counts, 0)
    u0, u1, u2, u3 = load4(full_counts, 0)
    done0, done1, done2, done3 = in_full_tiles(u0, u1, u2, u3, LOG_BLOCK_N, TILE)
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    # One position a thread while rows are looked up; every thread that copies gets them after.
    lane = gl.arange(0, TILE, gl.BlockedLayout([1], [32], [COPY_WARPS], [0]))
    d = gl.arange(0, D, gl.SliceLayout(0, layout))
    end0, end1, end2, end3 = tile_ends(done0, done1, done2, done3, TILE)
    for t in range(end0):
        _load_boxes(
            long,
            entries,
            first_key,
            t * TILE,
            copied + t,
            padded_len,
            ring,
            full,
            empty,
            0,
            LOG_BLOCK_N,
            SLOTS,
        )
    for t in range(end0, end1):
        _load_boxes(
            half,
            entries + n0,
            first_pooled,
            (t - end0) * TILE,
            copied + t,
            padded_len,
            ring,
            full,
            empty,
            1,
            LOG_BLOCK_N,
            SLOTS,
        )
    for t in range(end1, end3):
        g = 2 + (t >= end2).to(gl.int32)
        level_entry = n0 + n1 + gl.where(g == 2, 0, n2)
        position = (t - gl.where(g == 2, end1, end2)) * TILE + lane
        rows = gather_rows(entries, level_entry, position, g, padded_len, LOG_BLOCK_N)
        rows = gl.convert_layout(rows, row_layout)
        _copy_rows(pooled, rows, d, copied + t, ring, full, empty, D, SLOTS)
    left = tail_length(n0, n1, n2, n3, done0, done1, done2, done3, LOG_BLOCK_N)
    tail = (left + TILE - 1) // TILE
    for i in range(tail):
        rows, last, bias = tail_rows(
            entries,
            i * TILE + lane,
            n0,
            n1,
            n2,
            n3,
            done0,
            done1,
            done2,
            done3,
            padded_len,
            kv_len,
            LOG_BLOCK_N,
        )
        # A row that is not there has weight 0; any real one stands in for it.
        rows = gl.where(bias > float("-inf"), rows, 0)
        rows += gl.where(rows < padded_len, 0, apart)
        rows = gl.convert_layout(rows, row_layout)
        _copy_rows(pointer, rows, d, copied + end3 + i, ring, full, empty, D, SLOTS)
    return end3 + tail


def boxes(rows: Rows, block_n: int, tile: int) -> tuple[TensorDescriptor, ...]:
    """Descriptors (k_long, k_half, v_long, v_half) of the rows of all heads as one matrix.

    A long box is the rows of a block of level 1, a half box those of level 2, or a tile if that
    is smaller.
    """
    long, half = (min(block_n >> g, tile) for g in (0, 1))
    return (
        row_boxes(rows.k, long),
        row_boxes(rows.pooled_k, half),
        row_boxes(rows.v, long),
        row_boxes(rows.pooled_v, half),
    )
