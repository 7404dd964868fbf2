"""The `pooled` and `sampled` scores for Hopper, warp-specialised: one warpgroup copies, two
multiply.

Same arithmetic as `scores`: products of the rows with one column of every key block at a time,
the largest kept element by element. Keys lie by their place in the block, so that such a column is
a box that one tensor copy brings. One warpgroup fills a ring of columns, 128 key blocks wide; each
of the other two owns 64 rows, keeps them in registers, and takes maxima while the other one's
product occupies the tensor cores. Block maxima go through a slab of scratch that the thread that
wrote them reads back, so that no barrier is needed.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from psa_torch.kernels.configs import HopperScoreConfig

# Renamed between Triton 3.6 and 3.9.
load_async = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.jit
def _item(
    item,
    heads,
    group_heads,
    q_len,
    kv_len,
    row_tiles,
    block_tiles,
    Q_BLOCKS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    TILE_KEYS: gl.constexpr,
    CAUSAL: gl.constexpr,
):
    """(first query block, batch, head, batch and key head, tiles that every row sees whole, tiles
    seen)."""
    # Under causality the last rows see most: they come first.
    block = (row_tiles - 1 - item % row_tiles) * Q_BLOCKS
    bh = item // row_tiles
    batch = bh // heads
    head = bh % heads
    open_tiles = block_tiles
    seen_tiles = block_tiles
    if CAUSAL:
        first = block * BLOCK_M + kv_len - q_len
        last = gl.minimum((block + Q_BLOCKS) * BLOCK_M, q_len) - 1 + kv_len - q_len
        open_tiles = gl.minimum(gl.maximum(first + 1, 0) // TILE_KEYS, block_tiles)
        seen = (gl.maximum(last + 1, 0) + TILE_KEYS - 1) // TILE_KEYS
        seen_tiles = gl.minimum(seen, block_tiles)
    kv_bh = batch * (heads // group_heads) + head // group_heads
    return block, batch.to(gl.int64), head.to(gl.int64), kv_bh, open_tiles, seen_tiles


@gluon.jit
def _place_in_block(OFFSETS, sample):
    """Row inside its block of a sample."""
    if OFFSETS is None:
        place = sample
    else:
        place = gl.load(OFFSETS + sample)
    return place


@gluon.jit
def _load_columns(
    k_box,
    heads,
    group_heads,
    q_len,
    kv_len,
    k_blocks,
    row_tiles,
    items,
    ring,
    full,
    empty,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    Q_BLOCKS: gl.constexpr,
    K_COUNT: gl.constexpr,
    SLOTS: gl.constexpr,
    CAUSAL: gl.constexpr,
):
    """The copying warpgroup: for every tile of key blocks, one column of each at a time.

    What lies past the last key block belongs to the next column, or is zero.
    """
    WIDTH: gl.constexpr = ring.shape[1]
    BYTES: gl.constexpr = WIDTH * ring.shape[2] * 2
    block_tiles = (k_blocks + WIDTH - 1) // WIDTH
    loaded = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        block, batch, head, kv_bh, open_tiles, seen_tiles = _item(
            item,
            heads,
            group_heads,
            q_len,
            kv_len,
            row_tiles,
            block_tiles,
            Q_BLOCKS,
            BLOCK_M,
            WIDTH * BLOCK_N,
            CAUSAL,
        )
        for tile in range(seen_tiles):
            for sample in range(K_COUNT):
                slot = loaded % SLOTS
                row = (kv_bh * K_COUNT + sample) * k_blocks + tile * WIDTH
                mbarrier.wait(empty.index(slot), (loaded // SLOTS) & 1 ^ 1)
                mbarrier.expect(full.index(slot), BYTES)
                load_async(k_box, [row, 0], full.index(slot), ring.index(slot))
                loaded += 1


@gluon.jit
def _largest_products(
    q,
    peak,
    ring,
    full,
    empty,
    multiplied,
    sample,
    first,
    row_position,
    K_OFFSETS,
    k_rows,
    SIZE: gl.constexpr,
    SLOTS: gl.constexpr,
    MASKED: gl.constexpr,
    NEGATIVE: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """The larger of `peak` and the products with the next column of the ring."""
    slot = multiplied % SLOTS
    mbarrier.wait(full.index(slot), (multiplied // SLOTS) & 1)
    column = ring.index(slot).permute([1, 0])
    zero = gl.zeros(peak.shape, gl.float32, LAYOUT)
    token = warpgroup_mma(q, column, zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[token])
    mbarrier.arrive(empty.index(slot), count=1)
    if NEGATIVE:
        s = -s
    if MASKED:
        index = gl.minimum(first + _place_in_block(K_OFFSETS, sample), k_rows - 1)
        seen = gl.expand_dims(index * SIZE, 0) <= gl.expand_dims(row_position, 1)
        s = gl.where(seen, s, float("-inf"))
    return gl.maximum(peak, s)


@gluon.jit
def _multiply_columns(
    part,
    Q,
    Q_SCALE,
    K_SCALE,
    Q_OFFSETS,
    K_OFFSETS,
    SLAB,
    SCORES,
    q_stride_b,
    q_stride_h,
    q_stride_l,
    q_stride_d,
    logit_factor,
    heads,
    group_heads,
    q_rows,
    k_rows,
    q_len,
    kv_len,
    q_blocks,
    k_blocks,
    row_tiles,
    items,
    width,
    ring,
    full,
    empty,
    D: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    SIZE: gl.constexpr,
    Q_COUNT: gl.constexpr,
    Q_BLOCKS: gl.constexpr,
    K_COUNT: gl.constexpr,
    SLOTS: gl.constexpr,
    CAUSAL: gl.constexpr,
    NEGATIVE: gl.constexpr,
):
    """One multiplying warpgroup: half of the query blocks of every item."""
    PART_ROWS: gl.constexpr = 64
    PART_BLOCKS: gl.constexpr = PART_ROWS // Q_COUNT
    WIDTH: gl.constexpr = ring.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    io_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    io_row: gl.constexpr = gl.SliceLayout(1, io_layout)
    d = gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, io_layout)), 0) * q_stride_d
    row = gl.arange(0, PART_ROWS, gl.SliceLayout(1, layout))
    lane = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    # Tile after tile, so that the places of a thread differ by constants.
    SLAB += (gl.program_id(0) * 2 + part).to(gl.int64) * PART_ROWS * width
    in_slab = gl.expand_dims(row * WIDTH, 1) + gl.expand_dims(lane, 0)
    # A thread owns the same rows and columns in both layouts.
    SWEEP: gl.constexpr = min(32, WIDTH)
    sweep_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SWEEP, 16])
    sweep_row_layout: gl.constexpr = gl.SliceLayout(1, sweep_layout)
    sweep_row = gl.arange(0, PART_ROWS, sweep_row_layout)
    sweep_lane = gl.arange(0, SWEEP, gl.SliceLayout(0, sweep_layout))
    in_sweep = gl.expand_dims(sweep_row * WIDTH, 1) + gl.expand_dims(sweep_lane, 0)
    lines: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    part_block = gl.expand_dims(gl.arange(0, PART_BLOCKS, gl.SliceLayout(1, lines)), 1)
    line = gl.expand_dims(gl.arange(0, SWEEP, gl.SliceLayout(0, lines)), 0)
    block_tiles = (k_blocks + WIDTH - 1) // WIDTH
    multiplied = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        block, batch, head, kv_bh, open_tiles, seen_tiles = _item(
            item,
            heads,
            group_heads,
            q_len,
            kv_len,
            row_tiles,
            block_tiles,
            Q_BLOCKS,
            BLOCK_M,
            WIDTH * BLOCK_N,
            CAUSAL,
        )
        mine = block + part * PART_BLOCKS
        io_lane = gl.arange(0, PART_ROWS, io_row)
        place = _place_in_block(Q_OFFSETS, io_lane % Q_COUNT)
        index = gl.minimum((mine + io_lane // Q_COUNT) * (BLOCK_M // SIZE) + place, q_rows - 1)
        at = gl.expand_dims(index.to(gl.int64), 1) * q_stride_l + d
        q = gl.load(Q + batch * q_stride_b + head * q_stride_h + at)
        q = gl.convert_layout(q, gl.DotOperandLayout(0, layout, 2))
        place = _place_in_block(Q_OFFSETS, row % Q_COUNT)
        index = gl.minimum((mine + row // Q_COUNT) * (BLOCK_M // SIZE) + place, q_rows - 1)
        row_position = gl.minimum(index * SIZE + SIZE, q_len) - 1 + kv_len - q_len

        row_max = gl.full([PART_ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, layout))
        for MASKED in gl.static_range(2 if CAUSAL else 1):
            for tile in range(open_tiles if MASKED else 0, seen_tiles if MASKED else open_tiles):
                key_block = gl.minimum(tile * WIDTH + lane, k_blocks - 1)
                peak = gl.full([PART_ROWS, WIDTH], float("-inf"), gl.float32, layout)
                for sample in range(K_COUNT):
                    peak = _largest_products(
                        q,
                        peak,
                        ring,
                        full,
                        empty,
                        multiplied,
                        sample,
                        key_block * (BLOCK_N // SIZE),
                        row_position,
                        K_OFFSETS,
                        k_rows,
                        SIZE,
                        SLOTS,
                        MASKED,
                        NEGATIVE,
                        layout,
                    )
                    multiplied += 1
                if K_SCALE is not None:
                    factor = gl.load(K_SCALE + kv_bh.to(gl.int64) * k_blocks + key_block)
                    peak = peak * gl.expand_dims(factor, 0)
                real = gl.expand_dims(tile * WIDTH + lane < k_blocks, 0)
                peak = gl.where(real, peak, float("-inf"))
                row_max = gl.maximum(row_max, gl.max(peak, 1))
                gl.store(SLAB + tile * (PART_ROWS * WIDTH) + in_slab, peak)

        if CAUSAL:  # a row that sees nothing: its -inf minus 0 gives a score of 0
            row_max = gl.where(row_max == float("-inf"), 0.0, row_max)
        bh = batch * heads + head
        row_factor = gl.full([PART_ROWS], 1.0, gl.float32, gl.SliceLayout(1, layout)) * logit_factor
        if Q_SCALE is not None:
            q_block = gl.minimum(mine + row // Q_COUNT, q_blocks - 1)
            row_factor *= gl.load(Q_SCALE + bh * q_blocks + q_block)
        out = SCORES + (bh * q_blocks + mine) * k_blocks
        parts = block_tiles * (WIDTH // SWEEP)
        ahead = gl.load(SLAB + in_sweep)
        for part_tile in range(parts):
            first = part_tile * SWEEP
            tile = first // WIDTH
            peak = gl.where(tile < seen_tiles, ahead, float("-inf"))
            # The next ones are on their way while these are reduced.
            first_ahead = gl.minimum(part_tile + 1, parts - 1) * SWEEP
            first_ahead += first_ahead // WIDTH * ((PART_ROWS - 1) * WIDTH)
            ahead = gl.load(SLAB + first_ahead + in_sweep)
            below = peak - gl.expand_dims(gl.convert_layout(row_max, sweep_row_layout), 1)
            below *= gl.expand_dims(gl.convert_layout(row_factor, sweep_row_layout), 1)
            # The rows of a block belong to one warp or to few: all blocks in one reduction.
            by_block = below.reshape([PART_BLOCKS, Q_COUNT, SWEEP])
            score = gl.convert_layout(gl.exp2(gl.max(by_block, 1)), lines)
            gl.store(
                out + part_block * k_blocks + first + line,
                score,
                mask=(mine + part_block < q_blocks) & (first + line < k_blocks),
            )


@gluon.jit
def peak_kernel_hopper(
    Q,
    k_box,
    Q_SCALE,
    K_SCALE,
    Q_OFFSETS,
    K_OFFSETS,
    SLAB,
    SCORES,
    q_stride_b,
    q_stride_h,
    q_stride_l,
    q_stride_d,
    logit_factor,
    heads,
    group_heads,
    q_rows,
    k_rows,
    q_len,
    kv_len,
    q_blocks,
    k_blocks,
    row_tiles,
    items,
    width,
    D: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    SIZE: gl.constexpr,
    Q_COUNT: gl.constexpr,
    Q_BLOCKS: gl.constexpr,
    K_COUNT: gl.constexpr,
    K_BLOCKS: gl.constexpr,
    SLOTS: gl.constexpr,
    MULTIPLY_REGISTERS: gl.constexpr,
    COPY_REGISTERS: gl.constexpr,
    CAUSAL: gl.constexpr,
    NEGATIVE: gl.constexpr,
):
    """Grid: any number of programs; arguments as in `scores._peak_kernel`, but for the keys.

    k_box: descriptor of `[B * Hk * K_COUNT * k_blocks, D]`, boxes of K_BLOCKS rows.
    """
    ring = gl.allocate_shared_memory(k_box.dtype, [SLOTS, K_BLOCKS, D], k_box.layout)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        # The copy arrives once, and each multiplying warpgroup.
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
    gl.warp_specialize(
        [
            (
                _multiply_columns,
                (
                    0,
                    Q,
                    Q_SCALE,
                    K_SCALE,
                    Q_OFFSETS,
                    K_OFFSETS,
                    SLAB,
                    SCORES,
                    q_stride_b,
                    q_stride_h,
                    q_stride_l,
                    q_stride_d,
                    logit_factor,
                    heads,
                    group_heads,
                    q_rows,
                    k_rows,
                    q_len,
                    kv_len,
                    q_blocks,
                    k_blocks,
                    row_tiles,
                    items,
                    width,
                    ring,
                    full,
                    empty,
                    D,
                    BLOCK_M,
                    BLOCK_N,
                    SIZE,
                    Q_COUNT,
                    Q_BLOCKS,
                    K_COUNT,
                    SLOTS,
                    CAUSAL,
                    NEGATIVE,
                ),
            ),
            (
                _multiply_columns,
                (
                    1,
                    Q,
                    Q_SCALE,
                    K_SCALE,
                    Q_OFFSETS,
                    K_OFFSETS,
                    SLAB,
                    SCORES,
                    q_stride_b,
                    q_stride_h,
                    q_stride_l,
                    q_stride_d,
                    logit_factor,
                    heads,
                    group_heads,
                    q_rows,
                    k_rows,
                    q_len,
                    kv_len,
                    q_blocks,
                    k_blocks,
                    row_tiles,
                    items,
                    width,
                    ring,
                    full,
                    empty,
                    D,
                    BLOCK_M,
                    BLOCK_N,
                    SIZE,
                    Q_COUNT,
                    Q_BLOCKS,
                    K_COUNT,
                    SLOTS,
                    CAUSAL,
                    NEGATIVE,
                ),
            ),
            (
                _load_columns,
                (
                    k_box,
                    heads,
                    group_heads,
                    q_len,
                    kv_len,
                    k_blocks,
                    row_tiles,
                    items,
                    ring,
                    full,
                    empty,
                    BLOCK_M,
                    BLOCK_N,
                    Q_BLOCKS,
                    K_COUNT,
                    SLOTS,
                    CAUSAL,
                ),
            ),
        ],
        [4, 4],
        [MULTIPLY_REGISTERS, COPY_REGISTERS],
    )


def launch(
    q: Tensor, k: Tensor, arguments: tuple, programs: int, config: HopperScoreConfig, **constants
) -> None:
    """Run the kernel.

    Args:
        q: rows, `[B, H, rows, D]`.
        k: keys by place, `[B, Hk, K_COUNT * k_blocks, D]`, contiguous.
        arguments: the run-time arguments of `peak_kernel_hopper` after k_box.
    """
    shape = [config.columns, k.shape[-1]]
    dtype = getattr(gl, str(k.dtype).removeprefix("torch."))
    layout = gl.NVMMASharedLayout.get_default_for(shape, dtype)
    box = TensorDescriptor.from_tensor(k.view(-1, k.shape[-1]), shape, layout)
    peak_kernel_hopper[(programs,)](
        q,
        box,
        *arguments,
        D=k.shape[-1],
        K_BLOCKS=config.columns,
        SLOTS=config.slots,
        MULTIPLY_REGISTERS=config.multiply_registers,
        COPY_REGISTERS=config.copy_registers,
        num_warps=4,
        **constants,
    )
