"""dk and dv of one level for Hopper, warp-specialised: two warpgroups multiply, four warps copy.

A program has a unit of pyramid rows, half of it for each multiplying warpgroup, in shared memory,
and walks the query blocks that see any of it (see `units`). Two warps bring q and two dout, into
rings of tiles from which both warpgroups multiply; one that a query block does not see passes
its tiles by. Same arithmetic as the `key_gradient` of every GPU.
"""

from typing import NamedTuple

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

from psa_torch._triton.constants import LOG2E
from psa_torch._triton.gluon import copy_async
from psa_torch._triton.launch import launch_kernel
from psa_torch._triton.products import start_when_full
from psa_torch._triton.rings import (
    new_barriers,
    release,
    stage_of,
    wait_empty,
    wait_full,
)
from psa_torch.attention.triton import hopper
from psa_torch.attention.triton.columns import in_columns
from psa_torch.attention.triton.configs import HopperKeyGradConfig, width_of
from psa_torch.attention.triton.hopper.copies import COPY_THREADS, COPY_WARPS, copy_columns
from psa_torch.attention.triton.hopper.units import LEAST_RUN, LOG_ENTRY, MASKED, Units
from psa_torch.attention.triton.row_statistics import RowStatistics
from psa_torch.attention.triton.rows import Rows
from psa_torch.attention.triton.walk import level_start
from psa_torch.kernels._launch import capability
from shared_specs.geometry import Geometry


class NumberedRing(NamedTuple):
    """A `rings.Ring` whose tiles have a number for each of their rows, in `numbers`."""

    tiles: object
    numbers: object
    full: object
    empty: object


class QuerySource(NamedTuple):
    """Pointer to q or dout, its strides, and the pointer to what it has of numbers."""

    pointer: object
    stride_b: object
    stride_h: object
    stride_m: object
    numbers: object


class UnitSizes(NamedTuple):
    """Numbers of one call, as the kernel has them."""

    kv_heads: object
    group: object
    q_len: object
    kv_len: object
    padded_len: object
    head_rows: object
    skipped: object
    q_blocks: object
    units: object


class OfKeys(NamedTuple):
    """Pointers to keys and values and to what they are owed, and where a program keeps its own."""

    k: object
    v: object
    dk_pooled: object
    dv_pooled: object
    dk: object
    dv: object
    k_tiles: object
    v_tiles: object


@gluon.jit
def _place(units, kv_heads):
    """(unit, batch and key head, batch, key head) of this program."""
    batch_kv_head = gl.program_id(0) // units
    batch = (batch_kv_head // kv_heads).to(gl.int64)
    return gl.program_id(0) % units, batch_kv_head, batch, batch_kv_head % kv_heads


@gluon.jit
def _copy_queries(source, lists, sizes, ring, D: gl.constexpr, BLOCK_M: gl.constexpr):
    """Those who copy: the rows of q, or of dout, of each query block listed, and a number a row."""
    entries, counts = lists
    kv_heads, group, q_blocks, units = sizes.kv_heads, sizes.group, sizes.q_blocks, sizes.units
    ROWS: gl.constexpr = ring.tiles.shape[1]
    WIDTH: gl.constexpr = ring.tiles.shape[2]
    PARTS: gl.constexpr = BLOCK_M // ROWS
    layout: gl.constexpr = gl.BlockedLayout(
        [1, 8], [256 // WIDTH, WIDTH // 8], [COPY_WARPS, 1], [1, 0]
    )
    d = gl.expand_dims(gl.arange(0, WIDTH, gl.SliceLayout(0, layout)), 0)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    lane = gl.arange(0, ROWS, gl.BlockedLayout([1], [32], [COPY_WARPS], [0]))
    unit, batch_kv_head, batch, kv_head = _place(units, kv_heads)
    copied = 0
    for member in range(group):
        batch_head = batch_kv_head * group + member
        head = (kv_head * group + member).to(gl.int64)
        rows = source.pointer + batch * source.stride_b + head * source.stride_h
        of_rows = source.numbers + batch_head.to(gl.int64) * (q_blocks * BLOCK_M) + lane
        table_row = batch_head * units + unit
        listed = entries + table_row.to(gl.int64) * q_blocks
        for x in range(gl.load(counts + table_row) * PARTS):
            block = gl.load(listed + x // PARTS) >> LOG_ENTRY
            first = block * BLOCK_M + x % PARTS * ROWS
            # Past the last query any real one will do: its weights are 0.
            m = gl.minimum(first + row, sizes.q_len - 1).to(gl.int64)
            stage = stage_of(ring, copied)
            wait_empty(ring, copied)
            at = gl.expand_dims(m * source.stride_m, 1) + d
            copy_columns(ring.tiles.index(stage), rows + at, d, D)
            copy_async(ring.numbers.index(stage), of_rows + first)
            async_copy.mbarrier_arrive(ring.full.index(stage), increment_count=False)
            copied += 1


@gluon.jit
def _multiply_unit(
    part,
    own,
    scale,
    lists,
    sizes,
    pair,
    D: gl.constexpr,
    BLOCK_M: gl.constexpr,
    LOG_BLOCK_N: gl.constexpr,
    G: gl.constexpr,
    IS_CAUSAL: gl.constexpr,
):
    """One multiplying warpgroup: its half of the unit through every tile of queries."""
    entries, counts = lists
    queries, gradients = pair
    kv_heads, group, q_len, kv_len, padded_len, head_rows, skipped, q_blocks, units = sizes
    OWN: gl.constexpr = own.k_tiles.shape[1]
    ROWS: gl.constexpr = queries.tiles.shape[1]
    WIDTH: gl.constexpr = queries.tiles.shape[2]
    PARTS: gl.constexpr = BLOCK_M // ROWS
    LOG_RUN: gl.constexpr = LOG_BLOCK_N - G
    # Key blocks that this half holds, or 1 where it is a part of one.
    BLOCKS: gl.constexpr = OWN >> LOG_RUN if OWN >> LOG_RUN > 1 else 1
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    io_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    s_row: gl.constexpr = gl.SliceLayout(1, s_layout)
    s_column: gl.constexpr = gl.SliceLayout(0, s_layout)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    dtype: gl.constexpr = own.k.dtype.element_ty

    unit, batch_kv_head, batch, kv_head = _place(units, kv_heads)
    first_run = unit * (2 * OWN) + part * OWN
    runs = padded_len >> G
    run = first_run + gl.arange(0, OWN, gl.SliceLayout(1, io_layout))
    rows = level_start(padded_len, G) - skipped + run
    # Keys that are read where they are end with the last of them.
    there = gl.expand_dims((run < runs) & (rows < head_rows), 1)
    d = gl.expand_dims(gl.arange(0, WIDTH, gl.SliceLayout(0, io_layout)), 0)
    there = in_columns(there, d, D, WIDTH)
    at = gl.expand_dims((batch_kv_head.to(gl.int64) * head_rows + rows) * D, 1) + d
    own_k = gl.load(own.k + at, mask=there, other=0.0)
    own_v = gl.load(own.v + at, mask=there, other=0.0)
    # Sums are 2**G times what a key is owed. They start from what the level above owes.
    run = first_run + gl.arange(0, OWN, gl.SliceLayout(1, o_layout))
    column = gl.expand_dims(gl.arange(0, WIDTH, gl.SliceLayout(0, o_layout)), 0)
    real = in_columns(gl.expand_dims(run < runs, 1), column, D, WIDTH)
    pooled = batch_kv_head.to(gl.int64) * (padded_len - padded_len // 8)
    above = pooled + (level_start(padded_len, G + 1) - padded_len + (run >> 1))
    above = gl.expand_dims(above * D, 1) + column
    dk = gl.load(own.dk_pooled + above, mask=real, other=0.0) * (1 << G)
    dv = gl.load(own.dv_pooled + above, mask=real, other=0.0) * (1 << G)
    k = own.k_tiles.index(part)
    v = own.v_tiles.index(part)
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
            stage = stage_of(queries, x)
            if bits > 0:
                s = start_when_full(k, queries, x, s_layout)
                dp = start_when_full(v, gradients, x, s_layout)
                shift = gl.expand_dims(G - queries.numbers.index(stage).load(s_column), 0)
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
                delta = gl.expand_dims(gradients.numbers.index(stage).load(s_column), 0)
                dp = warpgroup_mma_wait(0, deps=[dp])
                weights = gl.convert_layout(p.to(dtype), p_layout)
                dv = warpgroup_mma(weights, gradients.tiles.index(stage), dv, is_async=True)
                ds = gl.convert_layout((p * (dp - delta)).to(dtype), p_layout)
                dk = warpgroup_mma(ds, queries.tiles.index(stage), dk, is_async=True)
                dv, dk = warpgroup_mma_wait(0, deps=[dv, dk])
            else:
                wait_full(queries, x)
                wait_full(gradients, x)
            release(queries, x)
        multiplied += steps

    if G > 0:
        here = pooled + (level_start(padded_len, G) - padded_len + run)
        here = gl.expand_dims(here * D, 1) + column
        gl.store(own.dk_pooled + here, dk * (1.0 / (1 << G)), mask=real)
        gl.store(own.dv_pooled + here, dv * (1.0 / (1 << G)), mask=real)
    else:
        here = gl.expand_dims((batch_kv_head.to(gl.int64) * kv_len + run) * D, 1) + column
        live = in_columns(gl.expand_dims(run < kv_len, 1), column, D, WIDTH)
        gl.store(own.dk + here, (dk * scale).to(dtype), mask=live)
        gl.store(own.dv + here, dv.to(dtype), mask=live)


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
    WIDTH: gl.constexpr,
    BLOCK_M: gl.constexpr,
    LOG_BLOCK_N: gl.constexpr,
    G: gl.constexpr,
    ROWS: gl.constexpr,
    STAGES: gl.constexpr,
    MULTIPLY_REGISTERS: gl.constexpr,
    COPY_REGISTERS: gl.constexpr,
    IS_CAUSAL: gl.constexpr,
):
    """Grid: units over all key heads. Arguments as in the `key_gradient` of every
    GPU, but

    entries, counts: `Units` of the level.
    q_pointer, dout_pointer and their strides: multiples of 16 bytes, as copies need them.
    D, WIDTH: numbers of a row, and columns multiplied.
    """
    dtype: gl.constexpr = q_pointer.dtype.element_ty
    # Half of `units.UNIT_ROWS`.
    own_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, WIDTH], dtype)
    ring_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, WIDTH], dtype)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k_tiles = gl.allocate_shared_memory(dtype, [2, 64, WIDTH], own_layout)
    v_tiles = gl.allocate_shared_memory(dtype, [2, 64, WIDTH], own_layout)
    q_ring = gl.allocate_shared_memory(dtype, [STAGES, ROWS, WIDTH], ring_layout)
    dout_ring = gl.allocate_shared_memory(dtype, [STAGES, ROWS, WIDTH], ring_layout)
    lse2_ring = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], plain)
    delta_ring = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], plain)
    q_full = new_barriers(STAGES)
    dout_full = new_barriers(STAGES)
    # q and dout are needed equally long: the places of both are given back at once.
    empty = new_barriers(STAGES)
    for stage in gl.static_range(STAGES):
        # All threads that copy arrive as their copies land; each multiplying warpgroup once.
        mbarrier.init(q_full.index(stage), count=COPY_THREADS)
        mbarrier.init(dout_full.index(stage), count=COPY_THREADS)
        mbarrier.init(empty.index(stage), count=2)

    own = OfKeys(
        k_pointer, v_pointer, dk_pooled, dv_pooled, dk_pointer, dv_pointer, k_tiles, v_tiles
    )
    lists = (entries, counts)
    sizes = UnitSizes(
        kv_heads, group, q_len, kv_len, padded_len, head_rows, skipped, q_blocks, units
    )
    of_q = QuerySource(q_pointer, q_stride_b, q_stride_h, q_stride_m, lse2_pointer)
    of_dout = QuerySource(dout_pointer, dout_stride_b, dout_stride_h, dout_stride_m, delta_pointer)
    queries = NumberedRing(q_ring, lse2_ring, q_full, empty)
    gradients = NumberedRing(dout_ring, delta_ring, dout_full, empty)
    pair = (queries, gradients)
    gl.warp_specialize(
        [
            (
                _multiply_unit,
                (0, own, scale, lists, sizes, pair, D, BLOCK_M, LOG_BLOCK_N, G, IS_CAUSAL),
            ),
            (
                _multiply_unit,
                (1, own, scale, lists, sizes, pair, D, BLOCK_M, LOG_BLOCK_N, G, IS_CAUSAL),
            ),
            (_copy_queries, (of_q, lists, sizes, queries, D, BLOCK_M)),
            (_copy_queries, (of_dout, lists, sizes, gradients, D, BLOCK_M)),
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
    geometry: Geometry,
    *,
    g: int,
    scale: float,
    config: HopperKeyGradConfig,
) -> None:
    """As `key_gradient.launch_key_gradient`; `units` are those of the level, and q and dout are as
    `rows.aligned_rows` gives them.

    Raises:
        ValueError: the kernel has no instance for this head dimension, dtype, block or GPU.
    """
    heads, q_len, head_dim = q.shape[1:]
    call = (head_dim, q.dtype, geometry.block_m, capability(q))
    hopper.require_supported(config, *call, rows=config.rows)
    run = geometry.block_n >> g
    if run < LEAST_RUN:
        raise ValueError(
            f"{type(config).__name__} needs {LEAST_RUN} rows of a key block at level {1 << g}, "
            f"got {run}"
        )
    k, v, head_rows, skipped = rows.of_level(g)
    batch, kv_heads = k.shape[:2]
    count, q_blocks = units.entries.shape[2:]
    # Lists differ in length, and the hardware gives out programs of one unit each better than a
    # fixed order does.
    launch_kernel(
        key_gradient_hopper,
        (batch * kv_heads * count,),
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
        geometry.kv_len,
        geometry.padded_len,
        head_rows,
        skipped,
        q_blocks,
        count,
        D=head_dim,
        WIDTH=width_of(head_dim),
        BLOCK_M=geometry.block_m,
        LOG_BLOCK_N=geometry.block_n.bit_length() - 1,
        G=g,
        ROWS=config.rows,
        STAGES=config.stages,
        MULTIPLY_REGISTERS=config.multiply_registers,
        COPY_REGISTERS=config.copy_registers,
        IS_CAUSAL=geometry.is_causal,
        num_warps=4,
    )
