"""The forward for Hopper, warp-specialised: two warpgroups multiply, four warps copy.

A program takes query block after query block. Two warps bring keys into a ring of tiles and two
bring values, by tensor copies of whole runs where a tile is a few long ones, row by row elsewhere;
each pair runs ahead on its own. The first also brings the next queries while the last ones are
still in use. Each multiplying warpgroup owns 64 query rows and adds the values of one tile during
the softmax of the next. Same table, same tiles, same arithmetic as `forward`; Triton's interpreter
does not know Gluon (see the tests).
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from psa_torch.attention.triton.configs import HopperForwardConfig
from psa_torch.attention.triton.copies_hopper import (
    COPY_THREADS,
    COPY_WARPS,
    boxes,
    copy_async,
    copy_tiles,
)
from psa_torch.attention.triton.rows import Rows
from psa_torch.attention.triton.softmax_hopper import operand, shrink_by, tail_tile, whole_tile
from psa_torch.attention.triton.walk import (
    in_full_tiles,
    load4,
    place_of_item,
    tail_length,
    tail_rows,
    tile_ends,
)
from psa_torch.kernels._launch import capability, resident_programs

BLOCK_M = 128
HEAD_DIMS = (64, 128)
DTYPES = (torch.float16, torch.bfloat16)
LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _wait_for(full, t, there, SLOTS: gl.constexpr):
    """Waits until tile `t` is in its place of a ring, if it is `there`."""
    mbarrier.wait(full.index(t % SLOTS), (t // SLOTS) & 1, pred=there)


@gluon.jit
def _start_logits(q, k_ring, t, SLOTS: gl.constexpr, S_LAYOUT: gl.constexpr):
    """Starts q k^T of tile `t`, whose keys are in place."""
    # Gathered rows are ordinary writes; tensor cores read through another path.
    fence_async_shared()
    ROWS: gl.constexpr = q.shape[0]
    TILE: gl.constexpr = k_ring.shape[1]
    zero = gl.zeros([ROWS, TILE], gl.float32, S_LAYOUT)
    keys = k_ring.index(t % SLOTS).permute([1, 0])
    return warpgroup_mma(q, keys, zero, use_acc=False, is_async=True)


@gluon.jit
def _start_values(acc, weights, v_ring, v_full, t, SLOTS: gl.constexpr):
    """Starts acc + weights v of tile `t` as soon as its values are in place."""
    _wait_for(v_full, t, True, SLOTS)
    fence_async_shared()
    return warpgroup_mma(weights, v_ring.index(t % SLOTS), acc, is_async=True)


@gluon.jit
def _end_values(acc, weights, v_empty, t, SLOTS: gl.constexpr):
    """What `_start_values` began; then the place of the tile in the ring is free."""
    acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
    mbarrier.arrive(v_empty.index(t % SLOTS), count=1)
    return acc


@gluon.jit
def _copy_queries(
    q_pointer,
    q_stride_b,
    q_stride_h,
    q_stride_m,
    heads,
    q_len,
    block,
    batch_head,
    taken,
    q_tiles,
    q_full,
    q_empty,
    D: gl.constexpr,
):
    """Copies the `taken`-th query block of the program, half for each multiplying warpgroup."""
    ROWS: gl.constexpr = q_tiles.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [COPY_WARPS, 1], [1, 0])
    d = gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, layout)), 0)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    q_head = q_pointer + (batch_head // heads).to(gl.int64) * q_stride_b
    q_head += (batch_head % heads).to(gl.int64) * q_stride_h
    slot = taken % 2
    mbarrier.wait(q_empty.index(slot), (taken // 2) & 1 ^ 1)
    for part in gl.static_range(2):
        # Past the last query any real one will do: what comes of it is not stored.
        m = gl.minimum(block * (2 * ROWS) + part * ROWS + row, q_len - 1).to(gl.int64)
        at = gl.expand_dims(m * q_stride_m, 1) + d
        copy_async(q_tiles.index(slot * 2 + part), q_head + at)
    async_copy.mbarrier_arrive(q_full.index(slot), increment_count=False)


@gluon.jit
def _copy_items(
    q_pointer,
    pointer,
    pooled,
    apart,
    long,
    half,
    entries,
    counts,
    full_counts,
    q_stride_b,
    q_stride_h,
    q_stride_m,
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
    q_tiles,
    q_full,
    q_empty,
    ring,
    full,
    empty,
    D: gl.constexpr,
    LOG_BLOCK_N: gl.constexpr,
    TILE: gl.constexpr,
    SLOTS: gl.constexpr,
    IS_CAUSAL: gl.constexpr,
):
    """Those who copy: the keys or the values of each query block, and its queries if they have a
    `q_pointer`."""
    copied = 0
    taken = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        block, batch_head, kv_head = place_of_item(item, q_blocks, heads, group, IS_CAUSAL)
        if q_pointer is not None:
            _copy_queries(
                q_pointer,
                q_stride_b,
                q_stride_h,
                q_stride_m,
                heads,
                q_len,
                block,
                batch_head,
                taken,
                q_tiles,
                q_full,
                q_empty,
                D,
            )
        taken += 1
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
    entries,
    counts,
    full_counts,
    out_pointer,
    lse_pointer,
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
    k_ring,
    v_ring,
    q_full,
    q_empty,
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
    """One multiplying warpgroup: 64 rows of each query block through every tile."""
    ROWS: gl.constexpr = 64
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    io_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    s_row: gl.constexpr = gl.SliceLayout(1, s_layout)
    weights_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    dtype: gl.constexpr = out_pointer.dtype.element_ty

    lane = gl.arange(0, TILE, gl.BlockedLayout([1], [32], [4], [0]))
    multiplied = 0
    taken = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        block, batch_head, kv_head = place_of_item(item, q_blocks, heads, group, IS_CAUSAL)
        table_row = batch_head * q_blocks + block
        n0, n1, n2, n3 = load4(counts, table_row)
        u0, u1, u2, u3 = load4(full_counts, table_row)
        done0, done1, done2, done3 = in_full_tiles(u0, u1, u2, u3, LOG_BLOCK_N, TILE)
        end0, end1, end2, end3 = tile_ends(done0, done1, done2, done3, TILE)
        left = tail_length(n0, n1, n2, n3, done0, done1, done2, done3, LOG_BLOCK_N)
        tiles = end3 + (left + TILE - 1) // TILE

        q_slot = taken % 2
        q = q_tiles.index(q_slot * 2 + part)
        mbarrier.wait(q_full.index(q_slot), (taken // 2) & 1)
        taken += 1
        acc = gl.zeros([ROWS, D], gl.float32, o_layout)
        top = gl.full([ROWS], float("-inf"), gl.float32, s_row)
        total = gl.full([ROWS], 0.0, gl.float32, s_row)
        first = block * (2 * ROWS) + part * ROWS
        row = first + gl.arange(0, ROWS, s_row)
        position = row + (kv_len - q_len)
        listed = entries + table_row.to(gl.int64) * k_blocks
        if tiles > 0:
            _wait_for(k_full, multiplied, True, SLOTS)
            token = _start_logits(q, k_ring, multiplied, SLOTS, s_layout)
            s = warpgroup_mma_wait(0, deps=[token])
            mbarrier.arrive(k_empty.index(multiplied % SLOTS), count=1)
            _wait_for(k_full, multiplied + 1, tiles > 1, SLOTS)
            if end3 > 0:
                g = (end0 <= 0).to(gl.int32) + (end1 <= 0).to(gl.int32) + (end2 <= 0).to(gl.int32)
                p, shrink, top, total = whole_tile(s, top, total, scale, g.to(gl.float32), NEGATE)
            else:
                rows, last, bias = tail_rows(
                    listed,
                    lane,
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
                p, shrink, top, total = tail_tile(
                    s, top, total, scale, bias, last, position, IS_CAUSAL, NEGATE
                )
            weights = operand(p, dtype, weights_layout)
            last_tile = multiplied + tiles - 1

            # The values of one tile are added during the softmax of the next.
            for t in range(1, end3):
                x = multiplied + t
                token = _start_logits(q, k_ring, x, SLOTS, s_layout)
                adding = _start_values(acc, weights, v_ring, v_full, x - 1, SLOTS)
                s = warpgroup_mma_wait(1, deps=[token])
                mbarrier.arrive(k_empty.index(x % SLOTS), count=1)
                g = (t >= end0).to(gl.int32) + (t >= end1).to(gl.int32) + (t >= end2).to(gl.int32)
                p, shrink, top, total = whole_tile(s, top, total, scale, g.to(gl.float32), NEGATE)
                following = operand(p, dtype, weights_layout)
                _wait_for(k_full, x + 1, x < last_tile, SLOTS)
                acc = shrink_by(_end_values(adding, weights, v_empty, x - 1, SLOTS), shrink)
                weights = following

            for t in range(gl.maximum(end3, 1), tiles):
                x = multiplied + t
                token = _start_logits(q, k_ring, x, SLOTS, s_layout)
                adding = _start_values(acc, weights, v_ring, v_full, x - 1, SLOTS)
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
                s = warpgroup_mma_wait(1, deps=[token])
                mbarrier.arrive(k_empty.index(x % SLOTS), count=1)
                p, shrink, top, total = tail_tile(
                    s, top, total, scale, bias, last, position, IS_CAUSAL, NEGATE
                )
                following = operand(p, dtype, weights_layout)
                _wait_for(k_full, x + 1, x < last_tile, SLOTS)
                acc = shrink_by(_end_values(adding, weights, v_empty, x - 1, SLOTS), shrink)
                weights = following

            adding = _start_values(acc, weights, v_ring, v_full, last_tile, SLOTS)
            acc = _end_values(adding, weights, v_empty, last_tile, SLOTS)
        multiplied += tiles

        seen = total > 0
        norm = gl.where(seen, 1.0 / gl.where(seen, total, 1.0), 0.0)
        lse = (top + gl.log2(gl.where(seen, total, 1.0))) * LN2
        out = acc * gl.expand_dims(gl.convert_layout(norm, gl.SliceLayout(1, o_layout)), 1)
        # Nobody else reads these queries: their place serves to bring rows together.
        q.store(out.to(dtype))
        out = q.load(io_layout)
        mbarrier.arrive(q_empty.index(q_slot), count=1)
        out_row = batch_head.to(gl.int64) * q_len
        m = first + gl.arange(0, ROWS, gl.SliceLayout(1, io_layout))
        d = gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, io_layout)), 0)
        out_at = gl.expand_dims((out_row + m) * D, 1) + d
        gl.store(out_pointer + out_at, out, mask=gl.expand_dims(m < q_len, 1))
        lse = gl.where(seen, lse, float("-inf"))
        gl.store(lse_pointer + out_row + row, lse, mask=row < q_len)


@gluon.jit
def attention_forward_hopper(
    q_pointer,
    k_pointer,
    v_pointer,
    k_pooled,
    v_pooled,
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
    NEGATE: gl.constexpr,
):
    """Grid: any number of programs. Arguments as in `forward.attention_forward`, block_m 128, but

    items: query blocks over all heads.
    q_pointer, q_stride_b, q_stride_h, q_stride_m: multiples of 16 bytes, as copies need them.
    k_pointer, v_pointer, k_pooled, v_pooled, key_rows, pooled_rows, skipped, k_apart,
    v_apart: see `rows.Rows`.
    k_long, v_long, k_half, v_half: see `copies_hopper.boxes`.
    """
    dtype: gl.constexpr = q_pointer.dtype.element_ty
    tile_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, D], dtype)
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], dtype)
    # Two query blocks, of which each multiplying warpgroup has half.
    q_tiles = gl.allocate_shared_memory(dtype, [4, 64, D], q_layout)
    k_ring = gl.allocate_shared_memory(dtype, [SLOTS, TILE, D], tile_layout)
    v_ring = gl.allocate_shared_memory(dtype, [SLOTS, TILE, D], tile_layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    # All threads that copy arrive as their copies land; each multiplying warpgroup once.
    for slot in gl.static_range(2):
        mbarrier.init(q_full.index(slot), count=COPY_THREADS)
        mbarrier.init(q_empty.index(slot), count=2)
    for slot in gl.static_range(SLOTS):
        mbarrier.init(k_full.index(slot), count=COPY_THREADS)
        mbarrier.init(k_empty.index(slot), count=2)
        mbarrier.init(v_full.index(slot), count=COPY_THREADS)
        mbarrier.init(v_empty.index(slot), count=2)

    gl.warp_specialize(
        [
            (
                _multiply_tiles,
                (
                    0,
                    entries,
                    counts,
                    full_counts,
                    out_pointer,
                    lse_pointer,
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
                    k_ring,
                    v_ring,
                    q_full,
                    q_empty,
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
                    entries,
                    counts,
                    full_counts,
                    out_pointer,
                    lse_pointer,
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
                    k_ring,
                    v_ring,
                    q_full,
                    q_empty,
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
                _copy_items,
                (
                    q_pointer,
                    k_pointer,
                    k_pooled,
                    k_apart,
                    k_long,
                    k_half,
                    entries,
                    counts,
                    full_counts,
                    q_stride_b,
                    q_stride_h,
                    q_stride_m,
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
                    q_tiles,
                    q_full,
                    q_empty,
                    k_ring,
                    k_full,
                    k_empty,
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
                    None,
                    v_pointer,
                    v_pooled,
                    v_apart,
                    v_long,
                    v_half,
                    entries,
                    counts,
                    full_counts,
                    q_stride_b,
                    q_stride_h,
                    q_stride_m,
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
                    q_tiles,
                    q_full,
                    q_empty,
                    v_ring,
                    v_full,
                    v_empty,
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
    config: HopperForwardConfig,
    *,
    block_m: int,
    block_n: int,
    **constants,
) -> None:
    """Run the kernel.

    Args:
        arguments: what comes after q, k and v in those of `forward.attention_forward`.

    Raises:
        ValueError: the kernel has no instance for this head dimension, dtype, block or GPU.
    """
    batch, heads, q_len, head_dim = q.shape
    accepted = head_dim in HEAD_DIMS and q.dtype in DTYPES and block_m == BLOCK_M
    if not accepted or capability(q) != (9, 0):
        raise ValueError(
            f"HopperForwardConfig needs head dimension in {HEAD_DIMS}, float16 or bfloat16, "
            f"block_m {BLOCK_M} and compute capability 9.0, "
            f"got {head_dim}, {q.dtype}, {block_m} and {capability(q)}"
        )
    items = (q_len + BLOCK_M - 1) // BLOCK_M * batch * heads
    # Shared memory holds one program per multiprocessor. Under causality items differ much in
    # size, and the hardware gives out programs of one item each better than a fixed order does.
    programs = items if constants["IS_CAUSAL"] else min(items, resident_programs(q, 1))
    attention_forward_hopper[(programs,)](
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
        num_warps=4,
        **constants,
    )
