"""What the warp-specialised kernels for Hopper share: how pyramid rows get into a ring of tiles."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier

from psa_torch.attention.triton.walk import (
    gather_rows,
    in_full_tiles,
    load4,
    select4,
    tail_length,
    tail_rows,
)

# Renamed between Triton 3.6 and 3.9.
copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.jit
def copy_rows(
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
def place(item, blocks, heads, group, padded_len, D: gl.constexpr, IS_CAUSAL: gl.constexpr):
    """(block, batch and head, first element of the pyramid) of an item of work.

    The blocks of a head are neighbours, so that programs share its pyramid in L2. Under
    causality the last blocks see most: they come first.
    """
    block = item % blocks
    if IS_CAUSAL:
        block = blocks - 1 - block
    batch_head = item // blocks
    kv_head = (batch_head // heads).to(gl.int64) * (heads // group) + batch_head % heads // group
    return block, batch_head, kv_head * (2 * padded_len - padded_len // 8) * D


@gluon.jit
def copy_tiles(
    k_pointer,
    v_pointer,
    entries,
    counts,
    full_counts,
    heads,
    group,
    kv_len,
    padded_len,
    q_blocks,
    k_blocks,
    items,
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
    IS_CAUSAL: gl.constexpr,
):
    """The copying warpgroup: every tile of each table row, full ones first."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    # One position a thread while rows are looked up; every thread that copies gets them after.
    lane = gl.arange(0, TILE, gl.BlockedLayout([1], [32], [4], [0]))
    d = gl.arange(0, D, gl.SliceLayout(0, layout))
    copied = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        block, batch_head, pyramid = place(item, q_blocks, heads, group, padded_len, D, IS_CAUSAL)
        k_head = k_pointer + pyramid
        v_head = v_pointer + pyramid
        table_row = batch_head * q_blocks + block
        listed = entries + table_row.to(gl.int64) * k_blocks
        n0, n1, n2, n3 = load4(counts, table_row)
        u0, u1, u2, u3 = load4(full_counts, table_row)
        done0 = in_full_tiles(u0, 0, LOG_BLOCK_N, TILE)
        done1 = in_full_tiles(u1, 1, LOG_BLOCK_N, TILE)
        done2 = in_full_tiles(u2, 2, LOG_BLOCK_N, TILE)
        done3 = in_full_tiles(u3, 3, LOG_BLOCK_N, TILE)
        end0 = done0 // TILE
        end1 = end0 + done1 // TILE
        end2 = end1 + done2 // TILE
        end3 = end2 + done3 // TILE
        for t in range(end3):
            g = (t >= end0).to(gl.int32) + (t >= end1).to(gl.int32) + (t >= end2).to(gl.int32)
            level_entry = select4(g, 0, n0, n0 + n1, n0 + n1 + n2)
            position = (t - select4(g, 0, end0, end1, end2)) * TILE + lane
            rows = gather_rows(listed, level_entry, position, g, padded_len, LOG_BLOCK_N)
            rows = gl.convert_layout(rows, row_layout)
            copy_rows(
                k_head,
                v_head,
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
        tiles = end3 + (left + TILE - 1) // TILE
        for t in range(end3, tiles):
            rows, last, bias = tail_rows(
                listed,
                (t - end3) * TILE + lane,
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
            copy_rows(
                k_head,
                v_head,
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
        copied += tiles
