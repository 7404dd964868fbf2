"""The forward for Hopper, warp-specialised: two warpgroups multiply, four warps copy.

A program takes query block after query block. Two warps bring keys into a ring of tiles and two
bring values, by tensor copies of whole runs where a tile is a few long ones, row by row elsewhere;
each pair runs ahead on its own. The first also brings the next queries while the last ones are
still in use. Each multiplying warpgroup owns 64 query rows and adds the values of one tile during
the softmax of the next. Same table, same tiles, same arithmetic as `forward_pass`; Triton's
interpreter does not know Gluon (see the tests).
"""

from typing import NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from psa_torch._triton.constants import LN2, LOWEST
from psa_torch._triton.launch import launch_kernel
from psa_torch._triton.products import start_product
from psa_torch._triton.rings import Ring, new_barriers, release, tile_of, wait_full
from psa_torch.attention.triton import hopper
from psa_torch.attention.triton.columns import in_columns
from psa_torch.attention.triton.configs import HopperForwardConfig, width_of
from psa_torch.attention.triton.hopper.copies import (
    COPY_THREADS,
    COPY_WARPS,
    Lists,
    Queries,
    Sizes,
    Source,
    boxes,
    copy_items,
)
from psa_torch.attention.triton.hopper.softmax import operand, shrink_by, tail_tile, whole_tile
from psa_torch.attention.triton.rows import Rows
from psa_torch.attention.triton.walk import (
    open_row,
    place_of_item,
    tail_rows,
    tail_tiles,
    tile_ends,
)
from psa_torch.kernels._launch import capability, resident_programs


class Results(NamedTuple):
    """Pointers to what the kernel writes."""

    out: object
    lse: object


@gluon.jit
def _start_values(acc, weights, values, t):
    """Starts acc + weights v of tile `t` as soon as its values are in place."""
    wait_full(values, t)
    fence_async_shared()
    return warpgroup_mma(weights, tile_of(values, t), acc, is_async=True)


@gluon.jit
def _end_values(acc, weights, values, t):
    """What `_start_values` began; then the place of the tile in the ring is free."""
    acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
    release(values, t)
    return acc


@gluon.jit
def _multiply_tiles(
    part,
    lists,
    results,
    scale,
    sizes,
    rings,
    D: gl.constexpr,
    LOG_BLOCK_N: gl.constexpr,
    IS_CAUSAL: gl.constexpr,
    NEGATE: gl.constexpr,
):
    """One multiplying warpgroup: 64 rows of each query block through every tile."""
    queries, keys, values = rings
    q_len = sizes.q_len
    ROWS: gl.constexpr = queries.tiles.shape[1]
    TILE: gl.constexpr = keys.tiles.shape[1]
    WIDTH: gl.constexpr = keys.tiles.shape[2]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    io_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    s_row: gl.constexpr = gl.SliceLayout(1, s_layout)
    weights_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    dtype: gl.constexpr = results.out.dtype.element_ty

    lane = gl.arange(0, TILE, gl.BlockedLayout([1], [32], [4], [0]))
    multiplied = 0
    taken = 0
    for item in range(gl.program_id(0), sizes.items, gl.num_programs(0)):
        block, batch_head, kv_head = place_of_item(
            item, sizes.q_blocks, sizes.heads, sizes.group, IS_CAUSAL
        )
        table_row = batch_head * sizes.q_blocks + block
        stream = open_row(lists.counts, lists.full_counts, table_row, LOG_BLOCK_N, TILE)
        end0, end1, end2, end3 = tile_ends(stream.done, TILE)
        tiles = end3 + tail_tiles(stream, LOG_BLOCK_N, TILE)

        q = queries.tiles.index(taken % 2 * 2 + part)
        wait_full(queries, taken)
        turn = taken
        taken += 1
        acc = gl.zeros([ROWS, WIDTH], gl.float32, o_layout)
        top = gl.full([ROWS], LOWEST, gl.float32, s_row)
        total = gl.full([ROWS], 0.0, gl.float32, s_row)
        first = block * (2 * ROWS) + part * ROWS
        row = first + gl.arange(0, ROWS, s_row)
        position = row + (sizes.kv_len - q_len)
        listed = lists.entries + table_row.to(gl.int64) * sizes.k_blocks
        if tiles > 0:
            wait_full(keys, multiplied)
            token = start_product(q, keys, multiplied, s_layout)
            s = warpgroup_mma_wait(0, deps=[token])
            release(keys, multiplied)
            wait_full(keys, multiplied + 1, tiles > 1)
            if end3 > 0:
                g = (end0 <= 0).to(gl.int32) + (end1 <= 0).to(gl.int32) + (end2 <= 0).to(gl.int32)
                p, shrink, top, total = whole_tile(s, top, total, scale, g.to(gl.float32), NEGATE)
            else:
                rows, last, bias = tail_rows(
                    listed,
                    lane,
                    stream.counts,
                    stream.done,
                    sizes.padded_len,
                    sizes.kv_len,
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
                token = start_product(q, keys, x, s_layout)
                adding = _start_values(acc, weights, values, x - 1)
                s = warpgroup_mma_wait(1, deps=[token])
                release(keys, x)
                g = (t >= end0).to(gl.int32) + (t >= end1).to(gl.int32) + (t >= end2).to(gl.int32)
                p, shrink, top, total = whole_tile(s, top, total, scale, g.to(gl.float32), NEGATE)
                following = operand(p, dtype, weights_layout)
                wait_full(keys, x + 1, x < last_tile)
                acc = shrink_by(_end_values(adding, weights, values, x - 1), shrink)
                weights = following

            for t in range(gl.maximum(end3, 1), tiles):
                x = multiplied + t
                token = start_product(q, keys, x, s_layout)
                adding = _start_values(acc, weights, values, x - 1)
                rows, last, bias = tail_rows(
                    listed,
                    (t - end3) * TILE + lane,
                    stream.counts,
                    stream.done,
                    sizes.padded_len,
                    sizes.kv_len,
                    LOG_BLOCK_N,
                )
                s = warpgroup_mma_wait(1, deps=[token])
                release(keys, x)
                p, shrink, top, total = tail_tile(
                    s, top, total, scale, bias, last, position, IS_CAUSAL, NEGATE
                )
                following = operand(p, dtype, weights_layout)
                wait_full(keys, x + 1, x < last_tile)
                acc = shrink_by(_end_values(adding, weights, values, x - 1), shrink)
                weights = following

            adding = _start_values(acc, weights, values, last_tile)
            acc = _end_values(adding, weights, values, last_tile)
        multiplied += tiles

        seen = total != 0  # NaN, past the range of float32, is not nothing
        norm = gl.where(seen, 1.0 / gl.where(seen, total, 1.0), 0.0)
        lse = (top + gl.log2(gl.where(seen, total, 1.0))) * LN2
        out = acc * gl.expand_dims(gl.convert_layout(norm, gl.SliceLayout(1, o_layout)), 1)
        # Nobody else reads these queries: their place serves to bring rows together.
        q.store(out.to(dtype))
        out = q.load(io_layout)
        release(queries, turn)
        out_row = batch_head.to(gl.int64) * q_len
        m = first + gl.arange(0, ROWS, gl.SliceLayout(1, io_layout))
        d = gl.expand_dims(gl.arange(0, WIDTH, gl.SliceLayout(0, io_layout)), 0)
        out_at = gl.expand_dims((out_row + m) * D, 1) + d
        real = in_columns(gl.expand_dims(m < q_len, 1), d, D, WIDTH)
        gl.store(results.out + out_at, out, mask=real)
        lse = gl.where(seen, lse, float("-inf"))
        gl.store(results.lse + out_row + row, lse, mask=row < q_len)


@gluon.jit(do_not_specialize=["k_apart", "v_apart"])
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
    WIDTH: gl.constexpr,
    LOG_BLOCK_N: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
    MULTIPLY_REGISTERS: gl.constexpr,
    COPY_REGISTERS: gl.constexpr,
    IS_CAUSAL: gl.constexpr,
    NEGATE: gl.constexpr,
):
    """Grid: any number of programs. Arguments as in `forward_pass.attention_forward`,
    block_m 128, but

    items: query blocks over all heads.
    q_pointer, q_stride_b, q_stride_h, q_stride_m: multiples of 16 bytes, as copies need them.
    k_pointer, v_pointer, k_pooled, v_pooled, key_rows, pooled_rows, skipped, k_apart,
    v_apart: see `rows.Rows`.
    k_long, v_long, k_half, v_half: see `copies.boxes`.
    D, WIDTH: numbers of a row, and columns multiplied.
    """
    dtype: gl.constexpr = q_pointer.dtype.element_ty
    tile_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, WIDTH], dtype)
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, WIDTH], dtype)
    # Two query blocks, of which each multiplying warpgroup has half.
    q_tiles = gl.allocate_shared_memory(dtype, [4, 64, WIDTH], q_layout)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, TILE, WIDTH], tile_layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, TILE, WIDTH], tile_layout)
    queries = Ring(q_tiles, new_barriers(2), new_barriers(2))
    keys = Ring(k_tiles, new_barriers(STAGES), new_barriers(STAGES))
    values = Ring(v_tiles, new_barriers(STAGES), new_barriers(STAGES))
    # All threads that copy arrive as their copies land; each multiplying warpgroup once.
    for stage in gl.static_range(2):
        mbarrier.init(queries.full.index(stage), count=COPY_THREADS)
        mbarrier.init(queries.empty.index(stage), count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(keys.full.index(stage), count=COPY_THREADS)
        mbarrier.init(keys.empty.index(stage), count=2)
        mbarrier.init(values.full.index(stage), count=COPY_THREADS)
        mbarrier.init(values.empty.index(stage), count=2)

    lists = Lists(entries, counts, full_counts)
    sizes = Sizes(heads, group, q_len, kv_len, padded_len, q_blocks, k_blocks, items)
    copied = Queries(q_pointer, q_stride_b, q_stride_h, q_stride_m, queries)
    of_keys = Source(k_pointer, k_pooled, k_apart, k_long, k_half, key_rows, pooled_rows, skipped)
    of_values = Source(v_pointer, v_pooled, v_apart, v_long, v_half, key_rows, pooled_rows, skipped)
    results = Results(out_pointer, lse_pointer)
    rings = (queries, keys, values)
    gl.warp_specialize(
        [
            (
                _multiply_tiles,
                (0, lists, results, scale, sizes, rings, D, LOG_BLOCK_N, IS_CAUSAL, NEGATE),
            ),
            (
                _multiply_tiles,
                (1, lists, results, scale, sizes, rings, D, LOG_BLOCK_N, IS_CAUSAL, NEGATE),
            ),
            (copy_items, (copied, of_keys, lists, sizes, keys, D, LOG_BLOCK_N, IS_CAUSAL)),
            (copy_items, (None, of_values, lists, sizes, values, D, LOG_BLOCK_N, IS_CAUSAL)),
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
        arguments: what comes after q, k and v in those of `forward_pass.attention_forward`.

    Raises:
        ValueError: the kernel has no instance for this head dimension, dtype, block or GPU.
    """
    batch, heads, q_len, head_dim = q.shape
    hopper.require_supported(config, head_dim, q.dtype, block_m, capability(q))
    width = width_of(head_dim)
    items = (q_len + hopper.BLOCK_M - 1) // hopper.BLOCK_M * batch * heads
    # Shared memory holds one program per multiprocessor. Under causality items differ much in
    # size, and the hardware gives out programs of one item each better than a fixed order does.
    programs = items if constants["IS_CAUSAL"] else min(items, resident_programs(q, 1))
    launch_kernel(
        attention_forward_hopper,
        (programs,),
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
        num_warps=4,
        **constants,
    )
