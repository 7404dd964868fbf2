"""dq for Hopper, warp-specialised: two warpgroups multiply, four warps copy.

A program takes query block after query block, and those who copy run ahead of the others through
rings of tiles, which they fill as those of `forward` do. Each multiplying warpgroup owns 64
query rows, whose q and dout lie in shared memory. Same table, same tiles, same arithmetic as
the `query_gradient` of every GPU.
"""

from typing import NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from psa_torch._triton.constants import LOG2E
from psa_torch._triton.launch import launch_kernel
from psa_torch._triton.rings import Ring, new_barriers
from psa_torch.attention.triton import hopper
from psa_torch.attention.triton.columns import in_columns
from psa_torch.attention.triton.configs import HopperQueryGradConfig, width_of
from psa_torch.attention.triton.hopper.copies import (
    COPY_THREADS,
    COPY_WARPS,
    Lists,
    Sizes,
    Source,
    boxes,
    copy_items,
)
from psa_torch.attention.triton.hopper.query_gradient_orders import (
    QueryRows,
    gradient_beside,
    gradient_in_turn,
)
from psa_torch.attention.triton.rows import Rows
from psa_torch.attention.triton.walk import open_row, place_of_item, tail_tiles, tile_ends
from psa_torch.kernels._launch import capability, resident_programs


class OfQueries(NamedTuple):
    """Pointers, and strides where they have any, to what belongs to query rows, and where a
    warpgroup keeps q and dout."""

    q: object
    q_strides: object
    dout: object
    dout_strides: object
    lse2: object
    delta: object
    dq: object
    q_tiles: object
    dout_tiles: object


@gluon.jit
def _multiply_tiles(
    part,
    queries,
    scale,
    lists,
    sizes,
    keys,
    values,
    D: gl.constexpr,
    LOG_BLOCK_N: gl.constexpr,
    IS_CAUSAL: gl.constexpr,
    BESIDE: gl.constexpr,
):
    """One multiplying warpgroup: 64 rows of each query block through every tile."""
    q_stride_b, q_stride_h, q_stride_m = queries.q_strides
    dout_stride_b, dout_stride_h, dout_stride_m = queries.dout_strides
    q_len = sizes.q_len
    ROWS: gl.constexpr = queries.q_tiles.shape[1]
    TILE: gl.constexpr = keys.tiles.shape[1]
    WIDTH: gl.constexpr = keys.tiles.shape[2]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    io_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    s_row: gl.constexpr = gl.SliceLayout(1, s_layout)
    dtype: gl.constexpr = queries.q.dtype.element_ty

    d = gl.expand_dims(gl.arange(0, WIDTH, gl.SliceLayout(0, io_layout)), 0)
    lane = gl.arange(0, TILE, gl.BlockedLayout([1], [32], [4], [0]))
    q = queries.q_tiles.index(part)
    dout = queries.dout_tiles.index(part)
    slope = scale * LOG2E
    multiplied = 0
    for item in range(gl.program_id(0), sizes.items, gl.num_programs(0)):
        block, batch_head, kv_head = place_of_item(
            item, sizes.q_blocks, sizes.heads, sizes.group, IS_CAUSAL
        )
        batch = (batch_head // sizes.heads).to(gl.int64)
        head = (batch_head % sizes.heads).to(gl.int64)
        table_row = batch_head * sizes.q_blocks + block
        listed = lists.entries + table_row.to(gl.int64) * sizes.k_blocks
        first = block * 128 + part * ROWS
        m = first + gl.arange(0, ROWS, gl.SliceLayout(1, io_layout))
        m64 = gl.expand_dims(m.to(gl.int64), 1)
        real = in_columns(gl.expand_dims(m < q_len, 1), d, D, WIDTH)
        q_head = queries.q + batch * q_stride_b + head * q_stride_h
        q.store(gl.load(q_head + (m64 * q_stride_m + d), mask=real, other=0.0))
        dout_head = queries.dout + batch * dout_stride_b + head * dout_stride_h
        dout.store(gl.load(dout_head + (m64 * dout_stride_m + d), mask=real, other=0.0))
        fence_async_shared()
        row = first + gl.arange(0, ROWS, s_row)
        padded_row = batch_head.to(gl.int64) * (sizes.q_blocks * 128) + row
        lse2 = gl.load(queries.lse2 + padded_row)
        delta = gl.load(queries.delta + padded_row)

        stream = open_row(lists.counts, lists.full_counts, table_row, LOG_BLOCK_N, TILE)
        ends = tile_ends(stream.done, TILE)
        tiles = ends[3] + tail_tiles(stream, LOG_BLOCK_N, TILE)
        rows = QueryRows(q, dout, lse2, delta, row + (sizes.kv_len - q_len), slope)
        gradient: gl.constexpr = gradient_beside if BESIDE else gradient_in_turn
        dq = gradient(
            gl.zeros([ROWS, WIDTH], gl.float32, o_layout),
            rows,
            listed,
            lane,
            stream,
            ends,
            tiles,
            sizes,
            multiplied,
            (keys, values),
            LOG_BLOCK_N,
            IS_CAUSAL,
        )

        # Nobody else reads these queries: their place serves to bring rows together.
        q.store((dq * scale).to(dtype))
        dq_row = batch_head.to(gl.int64) * q_len
        gl.store(queries.dq + (dq_row * D + m64 * D + d), q.load(io_layout), mask=real)
        multiplied += tiles


@gluon.jit(do_not_specialize=["k_apart", "v_apart"])
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
    WIDTH: gl.constexpr,
    LOG_BLOCK_N: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
    MULTIPLY_REGISTERS: gl.constexpr,
    COPY_REGISTERS: gl.constexpr,
    IS_CAUSAL: gl.constexpr,
    BESIDE: gl.constexpr,
):
    """Grid: any number of programs. Arguments as in the `query_gradient` of every GPU,
    block_m 128, but

    items: query blocks over all heads.
    k_pointer, v_pointer, k_pooled, v_pooled, key_rows, pooled_rows, skipped, k_apart,
    v_apart: see `rows.Rows`.
    k_long, v_long, k_half, v_half: see `copies.boxes`.
    D, WIDTH: numbers of a row, and columns multiplied.
    BESIDE: which order of `query_gradient_orders`.
    """
    dtype: gl.constexpr = q_pointer.dtype.element_ty
    tile_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, WIDTH], dtype)
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, WIDTH], dtype)
    q_tiles = gl.allocate_shared_memory(dtype, [2, 64, WIDTH], q_layout)
    dout_tiles = gl.allocate_shared_memory(dtype, [2, 64, WIDTH], q_layout)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, TILE, WIDTH], tile_layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, TILE, WIDTH], tile_layout)
    k_full = new_barriers(STAGES)
    v_full = new_barriers(STAGES)
    # Keys are needed longer than values: the places of both are given back at once.
    empty = new_barriers(STAGES)
    for stage in gl.static_range(STAGES):
        # All threads that copy arrive as their copies land; each multiplying warpgroup once.
        mbarrier.init(k_full.index(stage), count=COPY_THREADS)
        mbarrier.init(v_full.index(stage), count=COPY_THREADS)
        mbarrier.init(empty.index(stage), count=2)

    keys = Ring(k_tiles, k_full, empty)
    values = Ring(v_tiles, v_full, empty)
    lists = Lists(entries, counts, full_counts)
    sizes = Sizes(heads, group, q_len, kv_len, padded_len, q_blocks, k_blocks, items)
    of_keys = Source(k_pointer, k_pooled, k_apart, k_long, k_half, key_rows, pooled_rows, skipped)
    of_values = Source(v_pointer, v_pooled, v_apart, v_long, v_half, key_rows, pooled_rows, skipped)
    queries = OfQueries(
        q_pointer,
        (q_stride_b, q_stride_h, q_stride_m),
        dout_pointer,
        (dout_stride_b, dout_stride_h, dout_stride_m),
        lse2_pointer,
        delta_pointer,
        dq_pointer,
        q_tiles,
        dout_tiles,
    )
    gl.warp_specialize(
        [
            (
                _multiply_tiles,
                (0, queries, scale, lists, sizes, keys, values, D, LOG_BLOCK_N, IS_CAUSAL, BESIDE),
            ),
            (
                _multiply_tiles,
                (1, queries, scale, lists, sizes, keys, values, D, LOG_BLOCK_N, IS_CAUSAL, BESIDE),
            ),
            (copy_items, (None, of_keys, lists, sizes, keys, D, LOG_BLOCK_N, IS_CAUSAL)),
            (copy_items, (None, of_values, lists, sizes, values, D, LOG_BLOCK_N, IS_CAUSAL)),
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
    hopper.require_supported(config, head_dim, q.dtype, block_m, capability(q))
    width = width_of(head_dim)
    items = (q_len + hopper.BLOCK_M - 1) // hopper.BLOCK_M * batch * heads
    # Shared memory holds one program per multiprocessor.
    launch_kernel(
        query_gradient_hopper,
        (min(items, resident_programs(q, 1)),),
        q,
        *rows[:4],
        *arguments,
        items,
        *rows.places(),
        *boxes(rows, block_n, config.tile, width),
        D=head_dim,
        WIDTH=width,
        LOG_BLOCK_N=block_n.bit_length() - 1,
        TILE=config.tile,
        STAGES=config.stages,
        MULTIPLY_REGISTERS=config.multiply_registers,
        COPY_REGISTERS=config.copy_registers,
        BESIDE=config.beside,
        num_warps=4,
        **constants,
    )
