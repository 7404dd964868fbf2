"""What the warp-specialised kernels for Hopper share: how pyramid rows get into a ring of tiles."""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from psa_torch.attention.triton.walk import (
    gather_rows,
    in_full_tiles,
    load4,
    tail_length,
    tail_rows,
)

# Renamed between Triton 3.6 and 3.9.
copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
load_async = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.jit
def _copy_rows(
    k_pointer,
    v_pointer,
    rows,
    d,
    t,
    k_ring,
    v_ring,
    k_full,
    k_empty,
    v_full,
    v_empty,
    D: gl.constexpr,
    SLOTS: gl.constexpr,
):
    """Copies the rows of tile `t` into its place of both rings once that is free."""
    slot = t % SLOTS
    lap = (t // SLOTS) & 1
    at = gl.expand_dims(rows, 1) * D + gl.expand_dims(d, 0)
    mbarrier.wait(k_empty.index(slot), lap ^ 1)
    copy_async(k_ring.index(slot), k_pointer + at)
    async_copy.mbarrier_arrive(k_full.index(slot), increment_count=False)
    mbarrier.wait(v_empty.index(slot), lap ^ 1)
    copy_async(v_ring.index(slot), v_pointer + at)
    async_copy.mbarrier_arrive(v_full.index(slot), increment_count=False)


@gluon.jit
def _load_boxes(
    k_box,
    v_box,
    entries,
    first_row,
    position,
    t,
    padded_len,
    k_ring,
    v_ring,
    k_full,
    k_empty,
    v_full,
    v_empty,
    G: gl.constexpr,
    LOG_BLOCK_N: gl.constexpr,
    SLOTS: gl.constexpr,
):
    """Loads tile `t` by tensor copies, a box for each run of adjacent rows of level `2**G`.

    entries: points at the first block id of the level.
    first_row: row of the descriptors at which the pyramid of this head starts.
    """
    BOX: gl.constexpr = k_box.block_shape[0]
    TILE: gl.constexpr = k_ring.shape[1]
    BYTES: gl.constexpr = TILE * k_ring.shape[2] * 2
    slot = t % SLOTS
    lap = (t // SLOTS) & 1
    rows = ()
    for j in gl.static_range(TILE // BOX):
        row = gather_rows(entries, 0, position + j * BOX, G, padded_len, LOG_BLOCK_N)
        rows = rows + (first_row + row,)
    # The bytes count as the arrival of one thread; the other 127 have nothing to wait for.
    mbarrier.wait(k_empty.index(slot), lap ^ 1)
    mbarrier.expect(k_full.index(slot), BYTES)
    for j in gl.static_range(TILE // BOX):
        box = k_ring.index(slot).slice(j * BOX, BOX)
        load_async(k_box, [rows[j], 0], k_full.index(slot), box)
    mbarrier.arrive(k_full.index(slot), count=127)
    mbarrier.wait(v_empty.index(slot), lap ^ 1)
    mbarrier.expect(v_full.index(slot), BYTES)
    for j in gl.static_range(TILE // BOX):
        box = v_ring.index(slot).slice(j * BOX, BOX)
        load_async(v_box, [rows[j], 0], v_full.index(slot), box)
    mbarrier.arrive(v_full.index(slot), count=127)


@gluon.jit
def copy_tiles(
    k_pointer,
    v_pointer,
    k_long,
    k_half,
    v_long,
    v_half,
    first_row,
    entries,
    counts,
    full_counts,
    kv_len,
    padded_len,
    copied,
    k_ring,
    v_ring,
    k_full,
    k_empty,
    v_full,
    v_empty,
    D: gl.constexpr,
    LOG_BLOCK_N: gl.constexpr,
    TILE: gl.constexpr,
    SLOTS: gl.constexpr,
):
    """The work of the copying warpgroup for one table row: every tile, full ones first.

    Full tiles of levels 1 and 2 are a few long runs, loaded as boxes; rows of the others are
    gathered one by one.

    Args:
        k_pointer, v_pointer: the pyramid of this head.
        k_long, v_long, k_half, v_half: see `boxes`.
        first_row: row of the boxes at which the pyramid of this head starts.
        entries, counts, full_counts: the table row.
        copied: tiles that went through the ring before.

    Returns:
        Tiles of this table row.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    n0, n1, n2, n3 = load4(counts, 0)
    u0, u1, u2, u3 = load4(full_counts, 0)
    done0 = in_full_tiles(u0, 0, LOG_BLOCK_N, TILE)
    done1 = in_full_tiles(u1, 1, LOG_BLOCK_N, TILE)
    done2 = in_full_tiles(u2, 2, LOG_BLOCK_N, TILE)
    done3 = in_full_tiles(u3, 3, LOG_BLOCK_N, TILE)
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    # One position a thread while rows are looked up; every thread that copies gets them after.
    lane = gl.arange(0, TILE, gl.BlockedLayout([1], [32], [4], [0]))
    d = gl.arange(0, D, gl.SliceLayout(0, layout))
    end0 = done0 // TILE
    end1 = end0 + done1 // TILE
    end2 = end1 + done2 // TILE
    end3 = end2 + done3 // TILE
    for t in range(end0):
        _load_boxes(
            k_long,
            v_long,
            entries,
            first_row,
            t * TILE,
            copied + t,
            padded_len,
            k_ring,
            v_ring,
            k_full,
            k_empty,
            v_full,
            v_empty,
            0,
            LOG_BLOCK_N,
            SLOTS,
        )
    for t in range(end0, end1):
        _load_boxes(
            k_half,
            v_half,
            entries + n0,
            first_row,
            (t - end0) * TILE,
            copied + t,
            padded_len,
            k_ring,
            v_ring,
            k_full,
            k_empty,
            v_full,
            v_empty,
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
        _copy_rows(
            k_pointer,
            v_pointer,
            rows,
            d,
            copied + t,
            k_ring,
            v_ring,
            k_full,
            k_empty,
            v_full,
            v_empty,
            D,
            SLOTS,
        )
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
        rows = gl.convert_layout(gl.where(bias > float("-inf"), rows, 0), row_layout)
        _copy_rows(
            k_pointer,
            v_pointer,
            rows,
            d,
            copied + end3 + i,
            k_ring,
            v_ring,
            k_full,
            k_empty,
            v_full,
            v_empty,
            D,
            SLOTS,
        )
    return end3 + tail


def boxes(k: Tensor, v: Tensor, block_n: int, tile: int) -> tuple[TensorDescriptor, ...]:
    """Descriptors (k_long, k_half, v_long, v_half) of the pyramids k and v, `[B, Hk, P, D]`.

    They see matrices `[B * Hk * P, D]`. A long box is the rows of a block of level 1, a half box
    those of level 2, or a tile if that is smaller.
    """
    return tuple(_descriptor(rows, min(block_n >> g, tile)) for rows in (k, v) for g in (0, 1))


def _descriptor(rows: Tensor, box: int) -> TensorDescriptor:
    """Tensor copies of `box` adjacent rows of a pyramid `[B, Hk, P, D]`."""
    shape = [box, rows.shape[-1]]
    dtype = getattr(gl, str(rows.dtype).removeprefix("torch."))
    layout = gl.NVMMASharedLayout.get_default_for(shape, dtype)
    return TensorDescriptor.from_tensor(rows.view(-1, rows.shape[-1]), shape, layout)
