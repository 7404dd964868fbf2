"""dq for Hopper, warp-specialised: two warpgroups multiply, four warps copy.

A program takes query block after query block, and those who copy run ahead of the others through
rings of tiles, which they fill as those of `forward_hopper` do. Each multiplying warpgroup owns 64
query rows, whose q and dout lie in shared memory. Same table, same tiles, same arithmetic as
`query_gradient`.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
)

from psa_torch.attention.triton.configs import HopperQueryGradConfig
from psa_torch.attention.triton.copies_hopper import COPY_THREADS, COPY_WARPS, boxes, copy_tiles
from psa_torch.attention.triton.query_gradient_tiles_hopper import gradient_beside, gradient_in_turn
from psa_torch.attention.triton.rows import Rows
from psa_torch.attention.triton.walk import (
    in_full_tiles,
    load4,
    place_of_item,
    tail_length,
    tile_ends,
)
from psa_torch.kernels._launch import capability, resident_programs

BLOCK_M = 128
HEAD_DIMS = (64, 128)
DTYPES = (torch.float16, torch.bfloat16)
LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _copy_items(
    pointer,
    pooled,
    apart,
    long,
    half,
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
    key_rows,
    pooled_rows,
    skipped,
    ring,
    full,
    empty,
    D: gl.constexpr,
    LOG_BLOCK_N: gl.constexpr,
    TILE: gl.constexpr,
    SLOTS: gl.constexpr,
    IS_CAUSAL: gl.constexpr,
):
    """Those who copy: the tiles of keys, or of values, of each query block."""
    copied = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        block, batch_head, kv_head = place_of_item(item, q_blocks, heads, group, IS_CAUSAL)
        first_key = kv_head * key_rows
        first_pooled = kv_head * pooled_rows - skipped
        table_row = (batch_head * q_blocks + block).to(gl.int64)
        copied += copy_tiles(
            pointer + first_key * D,
            pooled + first_pooled * D,
            apart + (first_pooled - first_key).to(gl.int32),
            long,
            half,
            first_key.to(gl.int32),
            first_pooled.to(gl.int32),
            entries + table_row * k_blocks,
            counts + table_row * 4,
            full_counts + table_row * 4,
            kv_len,
            padded_len,
            copied,
            ring,
            full,
            empty,
            D,
            LOG_BLOCK_N,
            TILE,
            SLOTS,
        )


@gluon.jit
def _multiply_tiles(
    part,
    q_pointer,
    dout_pointer,
    lse2_pointer,
    delta_pointer,
    dq_pointer,
    entries,
    counts,
    full_counts,
    q_stride_b,
    q_stride_h,
    q_stride_m,
    dout_stride_b,
    dout_stride_h,
    dout_stride_m,
    scale,
    heads,
    group,
    q_len,
    kv_len,
    padded_len,
    q_blocks,
    k_blocks,
    items,
    q_tiles,
    dout_tiles,
    k_ring,
    v_ring,
    k_full,
    v_full,
    empty,
    D: gl.constexpr,
    LOG_BLOCK_N: gl.constexpr,
    TILE: gl.constexpr,
    SLOTS: gl.constexpr,
    IS_CAUSAL: gl.constexpr,
    BESIDE: gl.constexpr,
):
    """One multiplying warpgroup: 64 rows of each query block through every tile."""
    ROWS: gl.constexpr = 64
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    io_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    s_row: gl.constexpr = gl.SliceLayout(1, s_layout)
    dtype: gl.constexpr = q_pointer.dtype.element_ty

    d = gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, io_layout)), 0)
    lane = gl.arange(0, TILE, gl.BlockedLayout([1], [32], [4], [0]))
    q = q_tiles.index(part)
    dout = dout_tiles.index(part)
    slope = scale * LOG2E
    multiplied = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        block, batch_head, kv_head = place_of_item(item, q_blocks, heads, group, IS_CAUSAL)
        batch = (batch_head // heads).to(gl.int64)
        head = (batch_head % heads).to(gl.int64)
        table_row = batch_head * q_blocks + block
        listed = entries + table_row.to(gl.int64) * k_blocks
        first = block * 128 + part * ROWS
        m = first + gl.arange(0, ROWS, gl.SliceLayout(1, io_layout))
        m64 = gl.expand_dims(m.to(gl.int64), 1)
        real_row = gl.expand_dims(m < q_len, 1)
        q_head = q_pointer + batch * q_stride_b + head * q_stride_h
        q.store(gl.load(q_head + (m64 * q_stride_m + d), mask=real_row, other=0.0))
        dout_head = dout_pointer + batch * dout_stride_b + head * dout_stride_h
        dout.store(gl.load(dout_head + (m64 * dout_stride_m + d), mask=real_row, other=0.0))
        fence_async_shared()
        row = first + gl.arange(0, ROWS, s_row)
        padded_row = batch_head.to(gl.int64) * (q_blocks * 128) + row
        lse2 = gl.load(lse2_pointer + padded_row)
        delta = gl.load(delta_pointer + padded_row)

        n0, n1, n2, n3 = load4(counts, table_row)
        u0, u1, u2, u3 = load4(full_counts, table_row)
        done0, done1, done2, done3 = in_full_tiles(u0, u1, u2, u3, LOG_BLOCK_N, TILE)
        end0, end1, end2, end3 = tile_ends(done0, done1, done2, done3, TILE)
        left = tail_length(n0, n1, n2, n3, done0, done1, done2, done3, LOG_BLOCK_N)
        tiles = end3 + (left + TILE - 1) // TILE

        gradient: gl.constexpr = gradient_beside if BESIDE else gradient_in_turn
        dq = gradient(
            gl.zeros([ROWS, D], gl.float32, o_layout),
            q,
            dout,
            lse2,
            delta,
            row + (kv_len - q_len),
            slope,
            listed,
            lane,
            (n0, n1, n2, n3, done0, done1, done2, done3),
            (end0, end1, end2, end3),
            tiles,
            multiplied,
            padded_len,
            kv_len,
            k_ring,
            v_ring,
            k_full,
            v_full,
            empty,
            LOG_BLOCK_N,
            SLOTS,
            IS_CAUSAL,
            s_layout,
        )

        # Nobody else reads these queries: their place serves to bring rows together.
        q.store((dq * scale).to(dtype))
        dq_row = batch_head.to(gl.int64) * q_len
        gl.store(dq_pointer + (dq_row * D + m64 * D + d), q.load(io_layout), mask=real_row)
        multiplied += tiles


@gluon.jit
def query_gradient_hopper(
    q_pointer,
    k_pointer,
    v_pointer,
    k_pooled,
    v_pooled,
    dout_pointer,
    lse2_pointer,
    delta_pointer,
    entries,
    counts,
    full_counts,
    dq_pointer,
    q_stride_b,
    q_stride_h,
    q_stride_m,
    dout_stride_b,
    dout_stride_h,
    dout_stride_m,
    scale,
    heads,
    group,
    q_len,
    kv_len,
    padded_len,
    q_blocks,
    k_blocks,
    items,
    key_rows,
    pooled_rows,
    skipped,
    k_apart,
    v_apart,
    k_long,
    k_half,
    v_long,
    v_half,
    D: gl.constexpr,
    LOG_BLOCK_N: gl.constexpr,
    TILE: gl.constexpr,
    SLOTS: gl.constexpr,
    MULTIPLY_REGISTERS: gl.constexpr,
    COPY_REGISTERS: gl.constexpr,
    IS_CAUSAL: gl.constexpr,
    BESIDE: gl.constexpr,
):
    """Grid: any number of programs. Arguments as in `query_gradient`, block_m 128, but

    items: query blocks over all heads.
    k_pointer, v_pointer, k_pooled, v_pooled, key_rows, pooled_rows, skipped, k_apart,
    v_apart: see `rows.Rows`.
    k_long, v_long, k_half, v_half: see `copies_hopper.boxes`.
    BESIDE: which order of `query_gradient_tiles_hopper`.
    """
    dtype: gl.constexpr = q_pointer.dtype.element_ty
    tile_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, D], dtype)
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], dtype)
    q_tiles = gl.allocate_shared_memory(dtype, [2, 64, D], q_layout)
    dout_tiles = gl.allocate_shared_memory(dtype, [2, 64, D], q_layout)
    k_ring = gl.allocate_shared_memory(dtype, [SLOTS, TILE, D], tile_layout)
    v_ring = gl.allocate_shared_memory(dtype, [SLOTS, TILE, D], tile_layout)
    k_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    # Keys are needed longer than values: the places of both are given back at once.
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        # All threads that copy arrive as their copies land; each multiplying warpgroup once.
        mbarrier.init(k_full.index(slot), count=COPY_THREADS)
        mbarrier.init(v_full.index(slot), count=COPY_THREADS)
        mbarrier.init(empty.index(slot), count=2)

    gl.warp_specialize(
        [
            (
                _multiply_tiles,
                (
                    0,
                    q_pointer,
                    dout_pointer,
                    lse2_pointer,
                    delta_pointer,
                    dq_pointer,
                    entries,
                    counts,
                    full_counts,
                    q_stride_b,
                    q_stride_h,
                    q_stride_m,
                    dout_stride_b,
                    dout_stride_h,
                    dout_stride_m,
                    scale,
                    heads,
                    group,
                    q_len,
                    kv_len,
                    padded_len,
                    q_blocks,
                    k_blocks,
                    items,
                    q_tiles,
                    dout_tiles,
                    k_ring,
                    v_ring,
                    k_full,
                    v_full,
                    empty,
                    D,
                    LOG_BLOCK_N,
                    TILE,
                    SLOTS,
                    IS_CAUSAL,
                    BESIDE,
                ),
            ),
            (
                _multiply_tiles,
                (
                    1,
                    q_pointer,
                    dout_pointer,
                    lse2_pointer,
                    delta_pointer,
                    dq_pointer,
                    entries,
                    counts,
                    full_counts,
                    q_stride_b,
                    q_stride_h,
                    q_stride_m,
                    dout_stride_b,
                    dout_stride_h,
                    dout_stride_m,
                    scale,
                    heads,
                    group,
                    q_len,
                    kv_len,
                    padded_len,
                    q_blocks,
                    k_blocks,
                    items,
                    q_tiles,
                    dout_tiles,
                    k_ring,
                    v_ring,
                    k_full,
                    v_full,
                    empty,
                    D,
                    LOG_BLOCK_N,
                    TILE,
                    SLOTS,
                    IS_CAUSAL,
                    BESIDE,
                ),
            ),
            (
                _copy_items,
                (
                    k_pointer,
                    k_pooled,
                    k_apart,
                    k_long,
                    k_half,
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
                    key_rows,
                    pooled_rows,
                    skipped,
                    k_ring,
                    k_full,
                    empty,
                    D,
                    LOG_BLOCK_N,
                    TILE,
                    SLOTS,
                    IS_CAUSAL,
                ),
            ),
            (
                _copy_items,
                (
                    v_pointer,
                    v_pooled,
                    v_apart,
                    v_long,
                    v_half,
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
                    key_rows,
                    pooled_rows,
                    skipped,
                    v_ring,
                    v_full,
                    empty,
                    D,
                    LOG_BLOCK_N,
                    TILE,
                    SLOTS,
                    IS_CAUSAL,
                ),
            ),
        ],
        [4, COPY_WARPS, COPY_WARPS],
        [MULTIPLY_REGISTERS, COPY_REGISTERS, COPY_REGISTERS],
    )


def launch(
    q: Tensor,
    rows: Rows,
    arguments: tuple,
    config: HopperQueryGradConfig,
    *,
    block_m: int,
    block_n: int,
    **constants,
) -> None:
    """Run the kernel.

    Args:
        arguments: what comes after q, k and v in those of `query_gradient.query_gradient`.

    Raises:
        ValueError: the kernel has no instance for this head dimension, dtype, block or GPU.
    """
    batch, heads, q_len, head_dim = q.shape
    accepted = head_dim in HEAD_DIMS and q.dtype in DTYPES and block_m == BLOCK_M
    if not accepted or capability(q) != (9, 0):
        raise ValueError(
            f"HopperQueryGradConfig needs head dimension in {HEAD_DIMS}, float16 or bfloat16, "
            f"block_m {BLOCK_M} and compute capability 9.0, "
            f"got {head_dim}, {q.dtype}, {block_m} and {capability(q)}"
        )
    items = (q_len + BLOCK_M - 1) // BLOCK_M * batch * heads
    # Shared memory holds one program per multiprocessor.
    query_gradient_hopper[(min(items, resident_programs(q, 1)),)](
        q,
        *rows[:4],
        *arguments,
        items,
        *rows.places(),
        *boxes(rows, block_n, config.tile),
        D=head_dim,
        LOG_BLOCK_N=block_n.bit_length() - 1,
        TILE=config.tile,
        SLOTS=config.slots,
        MULTIPLY_REGISTERS=config.multiply_registers,
        COPY_REGISTERS=config.copy_registers,
        BESIDE=config.beside,
        num_warps=4,
        **constants,
    )
