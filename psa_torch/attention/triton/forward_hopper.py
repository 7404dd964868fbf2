"""The forward for Hopper, warp-specialised: one warpgroup copies, two multiply.

The copying warpgroup brings pyramid rows into a ring of tiles, by tensor copies of whole runs
where a tile is a few long ones, row by row elsewhere; each of the other two owns 64 query rows and
issues the logits of the next tile before the softmax of this one, so tensor cores work during both
softmaxes. Same table, same tiles, same arithmetic as `forward`; Triton's interpreter does not know
Gluon (see the tests).
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from psa_torch.attention.triton.configs import HopperForwardConfig
from psa_torch.attention.triton.copies_hopper import boxes, copy_tiles
from psa_torch.attention.triton.walk import in_full_tiles, load4, tail_length, tail_rows
from psa_torch.kernels._launch import capability

BLOCK_M = 128
HEAD_DIMS = (64, 128)
DTYPES = (torch.float16, torch.bfloat16)
LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _start_logits(
    q,
    k_ring,
    k_full,
    t,
    there,
    SLOTS: gl.constexpr,
    S_LAYOUT: gl.constexpr,
):
    """Starts q k^T of tile `t` as soon as its keys are in place."""
    slot = t % SLOTS
    mbarrier.wait(k_full.index(slot), (t // SLOTS) & 1, pred=there)
    # Gathered rows are ordinary writes; tensor cores read through another path.
    fence_async_shared()
    ROWS: gl.constexpr = q.shape[0]
    TILE: gl.constexpr = k_ring.shape[1]
    zero = gl.zeros([ROWS, TILE], gl.float32, S_LAYOUT)
    return warpgroup_mma(q, k_ring.index(slot).permute([1, 0]), zero, use_acc=False, is_async=True)


@gluon.jit
def _add_values(
    acc,
    p,
    shrink,
    v_ring,
    v_full,
    v_empty,
    t,
    SLOTS: gl.constexpr,
):
    """acc * shrink + p v of tile `t`; then its place in the ring is free."""
    layout: gl.constexpr = acc.type.layout
    shrink = gl.convert_layout(shrink, gl.SliceLayout(1, layout))
    acc = acc * gl.expand_dims(shrink, 1)
    weights = gl.convert_layout(p.to(v_ring.dtype), gl.DotOperandLayout(0, layout, 2))
    slot = t % SLOTS
    mbarrier.wait(v_full.index(slot), (t // SLOTS) & 1)
    fence_async_shared()
    token = warpgroup_mma(weights, v_ring.index(slot), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[token])
    mbarrier.arrive(v_empty.index(slot), count=1)
    return acc


@gluon.jit
def _multiply_tiles(
    part,
    q_pointer,
    out_pointer,
    lse_pointer,
    entries,
    counts,
    full_counts,
    q_stride_m,
    scale,
    first_row,
    out_row,
    q_len,
    kv_len,
    padded_len,
    q_tiles,
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
    NEGATE: gl.constexpr,
):
    """One multiplying warpgroup: 64 query rows through every tile."""
    ROWS: gl.constexpr = 64
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    io_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    s_row: gl.constexpr = gl.SliceLayout(1, s_layout)
    dtype: gl.constexpr = q_pointer.dtype.element_ty

    first = first_row + part * ROWS
    m = first + gl.arange(0, ROWS, gl.SliceLayout(1, io_layout))
    d = gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, io_layout)), 0)
    q_at = gl.expand_dims(m.to(gl.int64), 1) * q_stride_m + d
    q_values = gl.load(q_pointer + q_at, mask=gl.expand_dims(m < q_len, 1), other=0.0)
    if NEGATE:
        q_values = (-q_values.to(gl.float32)).to(dtype)
    q = q_tiles.index(part)
    q.store(q_values)
    fence_async_shared()

    n0, n1, n2, n3 = load4(counts, 0)
    u0, u1, u2, u3 = load4(full_counts, 0)
    done0 = in_full_tiles(u0, 0, LOG_BLOCK_N, TILE)
    done1 = in_full_tiles(u1, 1, LOG_BLOCK_N, TILE)
    done2 = in_full_tiles(u2, 2, LOG_BLOCK_N, TILE)
    done3 = in_full_tiles(u3, 3, LOG_BLOCK_N, TILE)
    end0 = done0 // TILE
    end1 = end0 + done1 // TILE
    end2 = end1 + done2 // TILE
    end3 = end2 + done3 // TILE
    left = tail_length(n0, n1, n2, n3, done0, done1, done2, done3, LOG_BLOCK_N)
    tiles = end3 + (left + TILE - 1) // TILE

    acc = gl.zeros([ROWS, D], gl.float32, o_layout)
    top = gl.full([ROWS], float("-inf"), gl.float32, s_row)
    total = gl.full([ROWS], 0.0, gl.float32, s_row)
    token = _start_logits(q, k_ring, k_full, 0, tiles > 0, SLOTS, s_layout)
    s = warpgroup_mma_wait(0, deps=[token])
    mbarrier.arrive(k_empty.index(0), count=1, pred=tiles > 0)
    for t in range(end3):
        more = t + 1 < tiles
        following = gl.where(more, t + 1, t)
        token = _start_logits(q, k_ring, k_full, following, more, SLOTS, s_layout)
        g = (t >= end0).to(gl.int32) + (t >= end1).to(gl.int32) + (t >= end2).to(gl.int32)
        bias = g.to(gl.float32)
        new_top = gl.maximum(top, gl.max(s, 1) * scale + bias)
        p = gl.exp2(s * scale - gl.expand_dims(new_top - bias, 1))
        shrink = gl.exp2(top - new_top)
        total = total * shrink + gl.sum(p, 1)
        top = new_top
        s = warpgroup_mma_wait(0, deps=[token])
        mbarrier.arrive(k_empty.index(following % SLOTS), count=1, pred=more)
        acc = _add_values(acc, p, shrink, v_ring, v_full, v_empty, t, SLOTS)

    row = first + gl.arange(0, ROWS, s_row)
    lane = gl.arange(0, TILE, gl.BlockedLayout([1], [32], [4], [0]))
    s_column: gl.constexpr = gl.SliceLayout(0, s_layout)
    for t in range(end3, tiles):
        _, last, bias = tail_rows(
            entries,
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
        s = s * scale + gl.expand_dims(gl.convert_layout(bias, s_column), 0)
        if IS_CAUSAL:
            position = gl.expand_dims(row + (kv_len - q_len), 1)
            last = gl.expand_dims(gl.convert_layout(last, s_column), 0)
            s = gl.where(last <= position, s, float("-inf"))
        new_top = gl.maximum(top, gl.max(s, 1))
        # A row that has seen nothing yet keeps -inf as its maximum, and must not subtract it.
        origin = gl.where(new_top == float("-inf"), 0.0, new_top)
        p = gl.exp2(s - gl.expand_dims(origin, 1))
        shrink = gl.exp2(top - origin)
        total = total * shrink + gl.sum(p, 1)
        top = new_top
        more = t + 1 < tiles
        following = gl.where(more, t + 1, t)
        # The mask took the registers that a second tile of logits would need until here.
        token = _start_logits(q, k_ring, k_full, following, more, SLOTS, s_layout)
        s = warpgroup_mma_wait(0, deps=[token])
        mbarrier.arrive(k_empty.index(following % SLOTS), count=1, pred=more)
        acc = _add_values(acc, p, shrink, v_ring, v_full, v_empty, t, SLOTS)

    seen = total > 0
    norm = gl.where(seen, 1.0 / gl.where(seen, total, 1.0), 0.0)
    lse = (top + gl.log2(gl.where(seen, total, 1.0))) * LN2
    out = acc * gl.expand_dims(gl.convert_layout(norm, gl.SliceLayout(1, o_layout)), 1)
    out = gl.convert_layout(out.to(dtype), io_layout)
    out_at = gl.expand_dims((out_row + m) * D, 1) + d
    gl.store(out_pointer + out_at, out, mask=gl.expand_dims(m < q_len, 1))
    gl.store(lse_pointer + out_row + row, gl.where(seen, lse, float("-inf")), mask=row < q_len)


@gluon.jit
def attention_forward_hopper(
    q_pointer,
    k_pointer,
    v_pointer,
    entries,
    counts,
    full_counts,
    out_pointer,
    lse_pointer,
    q_stride_b,
    q_stride_h,
    q_stride_m,
    scale,
    heads,
    group,
    q_len,
    kv_len,
    padded_len,
    q_blocks,
    k_blocks,
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
    NEGATE: gl.constexpr,
):
    """128 query rows of one head; arguments as in `forward.attention_forward`, block_m 128.

    k_long, v_long: descriptors of the pyramids as `[B * Hk * P, D]` with boxes of the rows of a
    level-1 block; k_half, v_half: of a level-2 block.
    """
    block = gl.program_id(0)
    if IS_CAUSAL:
        block = gl.num_programs(0) - 1 - block
    batch_head = gl.program_id(1)
    batch = batch_head // heads
    head = batch_head % heads
    kv_head = batch.to(gl.int64) * (heads // group) + head // group
    pyramid = kv_head * (2 * padded_len - padded_len // 8)
    q_pointer += batch.to(gl.int64) * q_stride_b + head.to(gl.int64) * q_stride_h
    table_row = batch_head * q_blocks + block
    counts += table_row.to(gl.int64) * 4
    full_counts += table_row.to(gl.int64) * 4
    entries += table_row.to(gl.int64) * k_blocks
    out_row = batch_head.to(gl.int64) * q_len

    dtype: gl.constexpr = q_pointer.dtype.element_ty
    tile_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, D], dtype)
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], dtype)
    q_tiles = gl.allocate_shared_memory(dtype, [2, 64, D], q_layout)
    k_ring = gl.allocate_shared_memory(dtype, [SLOTS, TILE, D], tile_layout)
    v_ring = gl.allocate_shared_memory(dtype, [SLOTS, TILE, D], tile_layout)
    k_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    # All 128 copying threads arrive as their copies land; each multiplying warpgroup once.
    for slot in gl.static_range(SLOTS):
        mbarrier.init(k_full.index(slot), count=128)
        mbarrier.init(k_empty.index(slot), count=2)
        mbarrier.init(v_full.index(slot), count=128)
        mbarrier.init(v_empty.index(slot), count=2)

    gl.warp_specialize(
        [
            (
                _multiply_tiles,
                (
                    0,
                    q_pointer,
                    out_pointer,
                    lse_pointer,
                    entries,
                    counts,
                    full_counts,
                    q_stride_m,
                    scale,
                    block * 128,
                    out_row,
                    q_len,
                    kv_len,
                    padded_len,
                    q_tiles,
                    k_ring,
                    v_ring,
                    k_full,
                    k_empty,
                    v_full,
                    v_empty,
                    D,
                    LOG_BLOCK_N,
                    TILE,
                    SLOTS,
                    IS_CAUSAL,
                    NEGATE,
                ),
            ),
            (
                _multiply_tiles,
                (
                    1,
                    q_pointer,
                    out_pointer,
                    lse_pointer,
                    entries,
                    counts,
                    full_counts,
                    q_stride_m,
                    scale,
                    block * 128,
                    out_row,
                    q_len,
                    kv_len,
                    padded_len,
                    q_tiles,
                    k_ring,
                    v_ring,
                    k_full,
                    k_empty,
                    v_full,
                    v_empty,
                    D,
                    LOG_BLOCK_N,
                    TILE,
                    SLOTS,
                    IS_CAUSAL,
                    NEGATE,
                ),
            ),
            (
                copy_tiles,
                (
                    k_pointer + pyramid * D,
                    v_pointer + pyramid * D,
                    k_long,
                    k_half,
                    v_long,
                    v_half,
                    pyramid.to(gl.int32),
                    entries,
                    counts,
                    full_counts,
                    kv_len,
                    padded_len,
                    0,
                    k_ring,
                    v_ring,
                    k_full,
                    k_empty,
                    v_full,
                    v_empty,
                    D,
                    LOG_BLOCK_N,
                    TILE,
                    SLOTS,
                ),
            ),
        ],
        [4, 4],
        [MULTIPLY_REGISTERS, COPY_REGISTERS],
    )


def launch(
    arguments: tuple, config: HopperForwardConfig, *, block_m: int, block_n: int, **constants
) -> None:
    """Run the kernel on the run-time arguments of `forward.attention_forward`.

    Raises:
        ValueError: the kernel has no instance for this head dimension, dtype, block or GPU.
    """
    q: Tensor = arguments[0]
    batch, heads, q_len, head_dim = q.shape
    accepted = head_dim in HEAD_DIMS and q.dtype in DTYPES and block_m == BLOCK_M
    if not accepted or capability(q) != (9, 0):
        raise ValueError(
            f"HopperForwardConfig needs head dimension in {HEAD_DIMS}, float16 or bfloat16, "
            f"block_m {BLOCK_M} and compute capability 9.0, "
            f"got {head_dim}, {q.dtype}, {block_m} and {capability(q)}"
        )
    attention_forward_hopper[(q_len + BLOCK_M - 1) // BLOCK_M, batch * heads](
        *arguments,
        *boxes(*arguments[1:3], block_n, config.tile),
        D=head_dim,
        LOG_BLOCK_N=block_n.bit_length() - 1,
        TILE=config.tile,
        SLOTS=config.slots,
        MULTIPLY_REGISTERS=config.multiply_registers,
        COPY_REGISTERS=config.copy_registers,
        num_warps=4,
        **constants,
    )
