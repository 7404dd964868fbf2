"""dk and dv of one level for Hopper, warp-specialised: two warpgroups multiply, four warps copy.

A program has a unit of pyramid rows, half of it for each multiplying warpgroup, in shared memory,
and walks the query blocks that see any of it (see `units`). Two warps bring q and two dout, into
rings of tiles from which both warpgroups multiply; one that a query block does not see passes
its tiles by. Same arithmetic as `key_gradient`.
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

from psa_torch.attention.triton.configs import HopperKeyGradConfig
from psa_torch.attention.triton.copies_hopper import COPY_THREADS, COPY_WARPS, copy_async
from psa_torch.attention.triton.products_hopper import start_with_tile
from psa_torch.attention.triton.row_statistics import LOG2E, RowStatistics
from psa_torch.attention.triton.rows import Rows
from psa_torch.attention.triton.units import LEAST_RUN, LOG_ENTRY, MASKED, Units
from psa_torch.attention.triton.walk import level_start
from psa_torch.kernels._launch import capability
from shared_specs.pyramid import padded_length

HEAD_DIMS = (64, 128)
DTYPES = (torch.float16, torch.bfloat16)


@gluon.jit
def _place(units, kv_heads):
    """(unit, batch and key head, batch, key head) of this program."""
    batch_kv_head = gl.program_id(0) // units
    batch = (batch_kv_head // kv_heads).to(gl.int64)
    return gl.program_id(0) % units, batch_kv_head, batch, batch_kv_head % kv_heads


@gluon.jit
def _copy_queries(
    pointer,
    numbers_pointer,
    stride_b,
    stride_h,
    stride_m,
    entries,
    counts,
    kv_heads,
    group,
    q_len,
    q_blocks,
    units,
    ring,
    numbers,
    full,
    empty,
    D: gl.constexpr,
    BLOCK_M: gl.constexpr,
    SLOTS: gl.constexpr,
):
    """Those who copy: the rows of q, or of dout, of each query block listed, and a number a row."""
    ROWS: gl.constexpr = ring.shape[1]
    PARTS: gl.constexpr = BLOCK_M // ROWS
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [COPY_WARPS, 1], [1, 0])
    d = gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, layout)), 0)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    lane = gl.arange(0, ROWS, gl.BlockedLayout([1], [32], [COPY_WARPS], [0]))
    unit, batch_kv_head, batch, kv_head = _place(units, kv_heads)
    copied = 0
    for member in range(group):
        batch_head = batch_kv_head * group + member
        head = (kv_head * group + member).to(gl.int64)
        rows = pointer + batch * stride_b + head * stride_h
        of_rows = numbers_pointer + batch_head.to(gl.int64) * (q_blocks * BLOCK_M) + lane
        table_row = batch_head * units + unit
        listed = entries + table_row.to(gl.int64) * q_blocks
        for x in range(gl.load(counts + table_row) * PARTS):
            block = gl.load(listed + x // PARTS) >> LOG_ENTRY
            first = block * BLOCK_M + x % PARTS * ROWS
            # Past the last query any real one will do: its weights are 0.
            m = gl.minimum(first + row, q_len - 1).to(gl.int64)
            slot = copied % SLOTS
            mbarrier.wait(empty.index(slot), (copied // SLOTS) & 1 ^ 1)
            copy_async(ring.index(slot), rows + (gl.expand_dims(m * stride_m, 1) + d))
            copy_async(numbers.index(slot), of_rows + first)
            async_copy.mbarrier_arrive(full.index(slot), increment_count=False)
            copied += 1


@gluon.jit
def _multiply_unit(
    part,
    k_pointer,
    v_pointer,
    entries,
    counts,
    dk_pooled,
    dv_pooled,
    dk_pointer,
    dv_pointer,
    scale,
    kv_heads,
    group,
    q_len,
    kv_len,
    padded_len,
    head_rows,
    skipped,
    q_blocks,
    units,
    k_tiles,
    v_tiles,
    q_ring,
    dout_ring,
    lse2_ring,
    delta_ring,
    q_full,
    dout_full,
    empty,
    D: gl.constexpr,
    BLOCK_M: gl.constexpr,
    LOG_BLOCK_N: gl.constexpr,
    G: gl.constexpr,
    SLOTS: gl.constexpr,
    IS_CAUSAL: gl.constexpr,
):
    """One multiplying warpgroup: its half of the unit through every tile of queries."""
    OWN: gl.constexpr = k_tiles.shape[1]
    ROWS: gl.constexpr = q_ring.shape[1]
    PARTS: gl.constexpr = BLOCK_M // ROWS
    LOG_RUN: gl.constexpr = LOG_BLOCK_N - G
    # Key blocks that this half holds, or 1 where it is a part of one.
    BLOCKS: gl.constexpr = OWN >> LOG_RUN if OWN >> LOG_RUN > 1 else 1
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    io_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    s_row: gl.constexpr = gl.SliceLayout(1, s_layout)
    s_column: gl.constexpr = gl.SliceLayout(0, s_layout)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    dtype: gl.constexpr = k_pointer.dtype.element_ty

    unit, batch_kv_head, batch, kv_head = _place(units, kv_heads)
    first_run = unit * (2 * OWN) + part * OWN
    runs = padded_len >> G
    run = first_run + gl.arange(0, OWN, gl.SliceLayout(1, io_layout))
    rows = level_start(padded_len, G) - skipped + run
    # Keys that are read where they are end with the last of them.
    there = gl.expand_dims((run < runs) & (rows < head_rows), 1)
    d = gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, io_layout)), 0)
    at = gl.expand_dims((batch_kv_head.to(gl.int64) * head_rows + rows) * D, 1) + d
    own_k = gl.load(k_pointer + at, mask=there, other=0.0)
    own_v = gl.load(v_pointer + at, mask=there, other=0.0)
    # Sums are 2**G times what a key is owed. They start from what the level above owes.
    run = first_run + gl.arange(0, OWN, gl.SliceLayout(1, o_layout))
    real = gl.expand_dims(run < runs, 1)
    column = gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, o_layout)), 0)
    pooled = batch_kv_head.to(gl.int64) * (padded_len - padded_len // 8)
    above = pooled + (level_start(padded_len, G + 1) - padded_len + (run >> 1))
    above = gl.expand_dims(above * D, 1) + column
    dk = gl.load(dk_pooled + above, mask=real, other=0.0) * (1 << G)
    dv = gl.load(dv_pooled + above, mask=real, other=0.0) * (1 << G)
    k = k_tiles.index(part)
    v = v_tiles.index(part)
    k.store(own_k)
    v.store(own_v)
    fence_async_shared()

    slope = scale * LOG2E
    # A unit that is a part of a key block has one bit, which is for both halves.
    first_bit = part * BLOCKS if (2 * OWN) >> LOG_RUN > 1 else 0
    s_run = first_run + gl.arange(0, OWN, s_row)
    last = gl.expand_dims(gl.minimum((s_run + 1) << G, kv_len) - 1, 1)
    of_block = 1 << ((s_run - first_run) >> LOG_RUN)
    multiplied = 0
    for member in range(group):
        table_row = (batch_kv_head * group + member) * units + unit
        listed = entries + table_row.to(gl.int64) * q_blocks
        steps = gl.load(counts + table_row) * PARTS
        following = gl.load(listed, mask=steps > 0, other=0)
        for t in range(steps):
            entry = following
            following = gl.load(listed + gl.minimum(t + 1, steps - 1) // PARTS)
            bits = (entry >> first_bit) & ((1 << BLOCKS) - 1)
            x = multiplied + t
            slot = x % SLOTS
            if bits > 0:
                s = start_with_tile(k, q_ring, q_full, x, SLOTS, s_layout)
                dp = start_with_tile(v, dout_ring, dout_full, x, SLOTS, s_layout)
                shift = gl.expand_dims(G - lse2_ring.index(slot).load(s_column), 0)
                s = warpgroup_mma_wait(1, deps=[s])
                s = s * slope + shift
                if BLOCKS > 1:
                    s = gl.where(gl.expand_dims(of_block & bits, 1) > 0, s, float("-inf"))
                if IS_CAUSAL:
                    if entry & MASKED > 0:
                        first = (entry >> LOG_ENTRY) * BLOCK_M + t % PARTS * ROWS
                        m = gl.arange(0, ROWS, s_column) + (first + kv_len - q_len)
                        s = gl.where(last <= gl.expand_dims(m, 0), s, float("-inf"))
                p = gl.exp2(s)
                delta = gl.expand_dims(delta_ring.index(slot).load(s_column), 0)
                dp = warpgroup_mma_wait(0, deps=[dp])
                weights = gl.convert_layout(p.to(dtype), p_layout)
                dv = warpgroup_mma(weights, dout_ring.index(slot), dv, is_async=True)
                ds = gl.convert_layout((p * (dp - delta)).to(dtype), p_layout)
                dk = warpgroup_mma(ds, q_ring.index(slot), dk, is_async=True)
                dv, dk = warpgroup_mma_wait(0, deps=[dv, dk])
            else:
                mbarrier.wait(q_full.index(slot), (x // SLOTS) & 1)
                mbarrier.wait(dout_full.index(slot), (x // SLOTS) & 1)
            mbarrier.arrive(empty.index(slot), count=1)
        multiplied += steps

    if G > 0:
        here = pooled + (level_start(padded_len, G) - padded_len + run)
        here = gl.expand_dims(here * D, 1) + column
        gl.store(dk_pooled + here, dk * (1.0 / (1 << G)), mask=real)
        gl.store(dv_pooled + here, dv * (1.0 / (1 << G)), mask=real)
    else:
        here = gl.expand_dims((batch_kv_head.to(gl.int64) * kv_len + run) * D, 1) + column
        live = gl.expand_dims(run < kv_len, 1)
        gl.store(dk_pointer + here, (dk * scale).to(dtype), mask=live)
        gl.store(dv_pointer + here, dv.to(dtype), mask=live)


@gluon.jit
def key_gradient_hopper(
    q_pointer,
    k_pointer,
    v_pointer,
    dout_pointer,
    lse2_pointer,
    delta_pointer,
    entries,
    counts,
    dk_pooled,
    dv_pooled,
    dk_pointer,
    dv_pointer,
    q_stride_b,
    q_stride_h,
    q_stride_m,
    dout_stride_b,
    dout_stride_h,
    dout_stride_m,
    scale,
    kv_heads,
    group,
    q_len,
    kv_len,
    padded_len,
    head_rows,
    skipped,
    q_blocks,
    units,
    D: gl.constexpr,
    BLOCK_M: gl.constexpr,
    LOG_BLOCK_N: gl.constexpr,
    G: gl.constexpr,
    ROWS: gl.constexpr,
    SLOTS: gl.constexpr,
    MULTIPLY_REGISTERS: gl.constexpr,
    COPY_REGISTERS: gl.constexpr,
    IS_CAUSAL: gl.constexpr,
):
    """Grid: units over all key heads. Arguments as in `key_gradient.key_gradient`, but

    entries, counts: `Units` of the level.
    q_pointer, dout_pointer and their strides: multiples of 16 bytes, as copies need them.
    """
    dtype: gl.constexpr = q_pointer.dtype.element_ty
    # Half of `units.UNIT_ROWS`.
    own_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], dtype)
    ring_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], dtype)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k_tiles = gl.allocate_shared_memory(dtype, [2, 64, D], own_layout)
    v_tiles = gl.allocate_shared_memory(dtype, [2, 64, D], own_layout)
    q_ring = gl.allocate_shared_memory(dtype, [SLOTS, ROWS, D], ring_layout)
    dout_ring = gl.allocate_shared_memory(dtype, [SLOTS, ROWS, D], ring_layout)
    lse2_ring = gl.allocate_shared_memory(gl.float32, [SLOTS, ROWS], plain)
    delta_ring = gl.allocate_shared_memory(gl.float32, [SLOTS, ROWS], plain)
    q_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    dout_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    # q and dout are needed equally long: the places of both are given back at once.
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        # All threads that copy arrive as their copies land; each multiplying warpgroup once.
        mbarrier.init(q_full.index(slot), count=COPY_THREADS)
        mbarrier.init(dout_full.index(slot), count=COPY_THREADS)
        mbarrier.init(empty.index(slot), count=2)

    gl.warp_specialize(
        [
            (
                _multiply_unit,
                (
                    0,
                    k_pointer,
                    v_pointer,
                    entries,
                    counts,
                    dk_pooled,
                    dv_pooled,
                    dk_pointer,
                    dv_pointer,
                    scale,
                    kv_heads,
                    group,
                    q_len,
                    kv_len,
                    padded_len,
                    head_rows,
                    skipped,
                    q_blocks,
                    units,
                    k_tiles,
                    v_tiles,
                    q_ring,
                    dout_ring,
                    lse2_ring,
                    delta_ring,
                    q_full,
                    dout_full,
                    empty,
                    D,
                    BLOCK_M,
                    LOG_BLOCK_N,
                    G,
                    SLOTS,
                    IS_CAUSAL,
                ),
            ),
            (
                _multiply_unit,
                (
                    1,
                    k_pointer,
                    v_pointer,
                    entries,
                    counts,
                    dk_pooled,
                    dv_pooled,
                    dk_pointer,
                    dv_pointer,
                    scale,
                    kv_heads,
                    group,
                    q_len,
                    kv_len,
                    padded_len,
                    head_rows,
                    skipped,
                    q_blocks,
                    units,
                    k_tiles,
                    v_tiles,
                    q_ring,
                    dout_ring,
                    lse2_ring,
                    delta_ring,
                    q_full,
                    dout_full,
                    empty,
                    D,
                    BLOCK_M,
                    LOG_BLOCK_N,
                    G,
                    SLOTS,
                    IS_CAUSAL,
                ),
            ),
            (
                _copy_queries,
                (
                    q_pointer,
                    lse2_pointer,
                    q_stride_b,
                    q_stride_h,
                    q_stride_m,
                    entries,
                    counts,
                    kv_heads,
                    group,
                    q_len,
                    q_blocks,
                    units,
                    q_ring,
                    lse2_ring,
                    q_full,
                    empty,
                    D,
                    BLOCK_M,
                    SLOTS,
                ),
            ),
            (
                _copy_queries,
                (
                    dout_pointer,
                    delta_pointer,
                    dout_stride_b,
                    dout_stride_h,
                    dout_stride_m,
                    entries,
                    counts,
                    kv_heads,
                    group,
                    q_len,
                    q_blocks,
                    units,
                    dout_ring,
                    delta_ring,
                    dout_full,
                    empty,
                    D,
                    BLOCK_M,
                    SLOTS,
                ),
            ),
        ],
        [4, COPY_WARPS, COPY_WARPS],
        [MULTIPLY_REGISTERS, COPY_REGISTERS, COPY_REGISTERS],
    )


def launch_key_gradient_hopper(
    q: Tensor,
    rows: Rows,
    dout: Tensor,
    statistics: RowStatistics,
    units: Units,
    pooled: Tensor,
    dk: Tensor,
    dv: Tensor,
    *,
    g: int,
    kv_len: int,
    block_m: int,
    block_n: int,
    scale: float,
    is_causal: bool,
    config: HopperKeyGradConfig,
) -> None:
    """As `key_gradient.launch_key_gradient`; `units` are those of the level, and q and dout are as
    `rows.aligned_rows` gives them.

    Raises:
        ValueError: the kernel has no instance for this head dimension, dtype, block or GPU.
    """
    heads, q_len, head_dim = q.shape[1:]
    accepted = head_dim in HEAD_DIMS and q.dtype in DTYPES and block_m % config.rows == 0
    if not accepted or block_n >> g < LEAST_RUN or capability(q) != (9, 0):
        raise ValueError(
            f"HopperKeyGradConfig needs head dimension in {HEAD_DIMS}, float16 or bfloat16, "
            f"block_m a multiple of its rows ({config.rows}), {LEAST_RUN} rows of a key block and "
            f"compute capability 9.0, got {head_dim}, {q.dtype}, {block_m}, {block_n >> g} and "
            f"{capability(q)}"
        )
    k, v, head_rows, skipped = rows.of_level(g)
    batch, kv_heads = k.shape[:2]
    count, q_blocks = units.entries.shape[2:]
    # Lists differ in length, and the hardware gives out programs of one unit each better than a
    # fixed order does.
    key_gradient_hopper[(batch * kv_heads * count,)](
        q,
        k,
        v,
        dout,
        statistics.lse2,
        statistics.delta,
        *units,
        pooled[0],
        pooled[1],
        dk,
        dv,
        *q.stride()[:3],
        *dout.stride()[:3],
        scale,
        kv_heads,
        heads // kv_heads,
        q_len,
        kv_len,
        padded_length(kv_len, block_n),
        head_rows,
        skipped,
        q_blocks,
        count,
        D=head_dim,
        BLOCK_M=block_m,
        LOG_BLOCK_N=block_n.bit_length() - 1,
        G=g,
        ROWS=config.rows,
        SLOTS=config.slots,
        MULTIPLY_REGISTERS=config.multiply_registers,
        COPY_REGISTERS=config.copy_registers,
        IS_CAUSAL=is_causal,
        num_warps=4,
    )
