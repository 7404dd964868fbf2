"""The `pooled` and `sampled` scores for Hopper, warp-specialised: two warpgroups multiply, two
warps copy, two make scores.

Same arithmetic as `scores`: products of the rows with one column of every key block at a time,
the largest kept element by element. Keys lie by their place in the block, so that such a column is
a box that one tensor copy brings, into a ring of columns of 128 key blocks. Each multiplying
warpgroup owns 64 rows and takes the maximum of one product while the next is under way. Its block
maxima go to a slab of scratch. When the rows of an item are done, their own maxima are known, and
two more warps turn the slab into scores during the products of the next item, in steps whose block
maxima they copy one step ahead. They have read a tile of the slab before the last columns are
brought that this tile's new maxima need.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from psa_torch._triton.boxes import row_boxes
from psa_torch._triton.gluon import barrier, copy_async, load_async
from psa_torch._triton.launch import launch_kernel
from psa_torch.kernels.configs import HopperScoreConfig

SCORE_WARPS = gl.constexpr(2)
"""Warps that make scores; the other two of their warpgroup copy."""


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
    """(first query block, batch and head, batch and key head, tiles that every row sees whole,
    tiles seen)."""
    # Under causality the last rows see most: they come first.
    block = (row_tiles - 1 - item % row_tiles) * Q_BLOCKS
    bh = item // row_tiles
    open_tiles = block_tiles
    seen_tiles = block_tiles
    if CAUSAL:
        first = block * BLOCK_M + kv_len - q_len
        last = gl.minimum((block + Q_BLOCKS) * BLOCK_M, q_len) - 1 + kv_len - q_len
        open_tiles = gl.minimum(gl.maximum(first + 1, 0) // TILE_KEYS, block_tiles)
        seen = (gl.maximum(last + 1, 0) + TILE_KEYS - 1) // TILE_KEYS
        seen_tiles = gl.minimum(seen, block_tiles)
    kv_bh = (bh // heads) * (heads // group_heads) + (bh % heads) // group_heads
    return block, bh, kv_bh, open_tiles, seen_tiles


@gluon.jit
def _place_in_block(OFFSETS, sample):
    """Row inside its block of a sample."""
    if OFFSETS is None:
        place = sample
    else:
        place = gl.load(OFFSETS + sample)
    return place


@gluon.jit
def _stage(slab, x, staged, landed, ROWS: gl.constexpr, WIDTH: gl.constexpr):
    """Starts to copy the block maxima of step `x` of an item."""
    STEP_ROWS: gl.constexpr = staged.shape[1]
    COLUMNS: gl.constexpr = staged.shape[2]
    layout: gl.constexpr = gl.BlockedLayout(
        [1, 4], [128 // COLUMNS, COLUMNS // 4], [SCORE_WARPS, 1], [1, 0]
    )
    tile, row, column = _corner(x, STEP_ROWS, COLUMNS, ROWS, WIDTH)
    rows = row + gl.arange(0, STEP_ROWS, gl.SliceLayout(1, layout))
    columns = column + gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
    at = gl.expand_dims(rows * WIDTH, 1) + gl.expand_dims(columns, 0)
    slot = x % 2
    copy_async(staged.index(slot), slab + tile * (ROWS * WIDTH) + at)
    async_copy.mbarrier_arrive(landed.index(slot), increment_count=False)


@gluon.jit
def _corner(
    x, STEP_ROWS: gl.constexpr, COLUMNS: gl.constexpr, ROWS: gl.constexpr, WIDTH: gl.constexpr
):
    """(tile, row in the item, key block in the tile) where step `x` begins: all rows of a tile,
    then the next."""
    PIECES: gl.constexpr = WIDTH // COLUMNS
    STEPS: gl.constexpr = ROWS // STEP_ROWS * PIECES
    return x // STEPS, x % STEPS // PIECES * STEP_ROWS, x % PIECES * COLUMNS


@gluon.jit
def _score(
    x,
    steps,
    slab,
    tops,
    Q_SCALE,
    SCORES,
    logit_factor,
    bh,
    block,
    q_blocks,
    k_blocks,
    staged,
    landed,
    ROWS: gl.constexpr,
    WIDTH: gl.constexpr,
    Q_COUNT: gl.constexpr,
):
    """Step `x` of an item: the scores of one query block, or of a few with few rows, with COLUMNS
    key blocks.

    Args:
        steps: steps of what the item's rows see; the scores after these are 0.
        slab, tops: maxima of the item's rows by key block, and in all.
        bh, block: the item's head and first query block.
    """
    STEP_ROWS: gl.constexpr = staged.shape[1]
    COLUMNS: gl.constexpr = staged.shape[2]
    BLOCKS: gl.constexpr = STEP_ROWS // Q_COUNT
    # A thread has whole columns: nothing is exchanged.
    layout: gl.constexpr = gl.BlockedLayout([STEP_ROWS, 1], [1, 32], [1, SCORE_WARPS], [0, 1])
    out_layout: gl.constexpr = gl.BlockedLayout([BLOCKS, 1], [1, 32], [1, SCORE_WARPS], [0, 1])
    tile, first_row, column = _corner(x, STEP_ROWS, COLUMNS, ROWS, WIDTH)
    query_block = first_row // Q_COUNT + gl.arange(0, BLOCKS, gl.SliceLayout(1, out_layout))
    query_block += block
    row = bh.to(gl.int64) * q_blocks + gl.minimum(query_block, q_blocks - 1)
    factor = gl.full([BLOCKS], 1.0, gl.float32, gl.SliceLayout(1, out_layout)) * logit_factor
    if Q_SCALE is not None:
        factor *= gl.load(Q_SCALE + row)
    below = gl.full([BLOCKS, COLUMNS], float("-inf"), gl.float32, out_layout)
    if x < steps:
        if x + 1 < steps:
            _stage(slab, x + 1, staged, landed, ROWS, WIDTH)
        top = gl.load(tops + first_row + gl.arange(0, STEP_ROWS, gl.SliceLayout(1, layout)))
        slot = x % 2
        mbarrier.wait(landed.index(slot), (x // 2) & 1)
        distance = staged.index(slot).load(layout) - gl.expand_dims(top, 1)
        by_block = gl.max(distance.reshape([BLOCKS, Q_COUNT, COLUMNS]), 1)
        below = gl.convert_layout(by_block, out_layout)
    key_block = tile * WIDTH + column + gl.arange(0, COLUMNS, gl.SliceLayout(0, out_layout))
    gl.store(
        SCORES + gl.expand_dims(row * k_blocks, 1) + gl.expand_dims(key_block, 0),
        gl.exp2(below * gl.expand_dims(factor, 1)),
        mask=gl.expand_dims(query_block < q_blocks, 1) & gl.expand_dims(key_block < k_blocks, 0),
    )
    # All have read before the next step is staged here.
    barrier()


@gluon.jit
def _make_scores(
    Q_SCALE,
    SLAB,
    TOPS,
    SCORES,
    logit_factor,
    heads,
    group_heads,
    q_len,
    kv_len,
    q_blocks,
    k_blocks,
    row_tiles,
    items,
    staged,
    done,
    landed,
    tile_free,
    tile_read,
    ROWS: gl.constexpr,
    WIDTH: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    Q_COUNT: gl.constexpr,
    Q_BLOCKS: gl.constexpr,
    CAUSAL: gl.constexpr,
):
    """Those who make scores of each item when it is done."""
    # A multiple of four: every item begins in the same place and phase.
    STEPS: gl.constexpr = ROWS * WIDTH // (staged.shape[1] * staged.shape[2])
    block_tiles = (k_blocks + WIDTH - 1) // WIDTH
    SLAB += gl.program_id(0).to(gl.int64) * block_tiles * (ROWS * WIDTH)
    TOPS += gl.program_id(0) * (2 * ROWS)
    taken = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        block, bh, kv_bh, open_tiles, seen_tiles = _item(
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
        steps = seen_tiles * STEPS
        side = taken % 2
        mbarrier.wait(done.index(side), (taken // 2) & 1)
        if steps > 0:
            _stage(SLAB, 0, staged, landed, ROWS, WIDTH)
        for tile in range(block_tiles):
            for x in range(tile * STEPS, (tile + 1) * STEPS):
                _score(
                    x,
                    steps,
                    SLAB,
                    TOPS + side * ROWS,
                    Q_SCALE,
                    SCORES,
                    logit_factor,
                    bh,
                    block,
                    q_blocks,
                    k_blocks,
                    staged,
                    landed,
                    ROWS,
                    WIDTH,
                    Q_COUNT,
                )
            if item + gl.num_programs(0) < items:
                # No more than two tiles ahead of those who copy, who could not tell more from none.
                read = taken * block_tiles + tile
                mbarrier.wait(tile_free.index(read % 2), (read // 2) & 1 ^ 1)
                mbarrier.arrive(tile_read.index(read % 2), count=1)
        taken += 1


@gluon.jit
def _copy(
    q_box,
    k_box,
    heads,
    group_heads,
    q_len,
    kv_len,
    q_blocks,
    k_blocks,
    row_tiles,
    items,
    q_tiles,
    ring,
    q_full,
    full,
    empty,
    tile_free,
    tile_read,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    Q_COUNT: gl.constexpr,
    Q_BLOCKS: gl.constexpr,
    K_COUNT: gl.constexpr,
    SLOTS: gl.constexpr,
    CAUSAL: gl.constexpr,
):
    """Those who copy: for every item its rows, and for every tile of key blocks one column of each
    at a time.

    What lies past the last query or key block belongs to the next head or column, or is zero.
    """
    PART_ROWS: gl.constexpr = q_tiles.shape[1]
    WIDTH: gl.constexpr = ring.shape[1]
    BYTES: gl.constexpr = WIDTH * ring.shape[2] * 2
    Q_BYTES: gl.constexpr = 2 * PART_ROWS * ring.shape[2] * 2
    block_tiles = (k_blocks + WIDTH - 1) // WIDTH
    loaded = 0
    taken = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        block, bh, kv_bh, open_tiles, seen_tiles = _item(
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
        side = taken % 2
        # Whose place these rows take is an item that has its scores.
        mbarrier.expect(q_full.index(side), Q_BYTES)
        for part in gl.static_range(2):
            row = (bh * q_blocks + block) * Q_COUNT + part * PART_ROWS
            load_async(q_box, [row, 0], q_full.index(side), q_tiles.index(side * 2 + part))
        for tile in range(block_tiles):
            if tile < seen_tiles:
                for sample in range(K_COUNT - 1):
                    _load_column(
                        k_box,
                        (kv_bh * K_COUNT + sample) * k_blocks + tile * WIDTH,
                        loaded,
                        ring,
                        full,
                        empty,
                        BYTES,
                        SLOTS,
                    )
                    loaded += 1
            if taken > 0:
                # The item before has left this tile of the slab.
                read = (taken - 1) * block_tiles + tile
                mbarrier.wait(tile_read.index(read % 2), (read // 2) & 1)
                mbarrier.arrive(tile_free.index(read % 2), count=1)
            if tile < seen_tiles:
                _load_column(
                    k_box,
                    (kv_bh * K_COUNT + K_COUNT - 1) * k_blocks + tile * WIDTH,
                    loaded,
                    ring,
                    full,
                    empty,
                    BYTES,
                    SLOTS,
                )
                loaded += 1
        taken += 1


@gluon.jit
def _load_column(k_box, row, loaded, ring, full, empty, BYTES: gl.constexpr, SLOTS: gl.constexpr):
    """Brings the `loaded`-th column to its place in the ring once that is free."""
    slot = loaded % SLOTS
    mbarrier.wait(empty.index(slot), (loaded // SLOTS) & 1 ^ 1)
    mbarrier.expect(full.index(slot), BYTES)
    load_async(k_box, [row, 0], full.index(slot), ring.index(slot))


@gluon.jit
def _start_product(q, ring, full, x, SLOTS: gl.constexpr, LAYOUT: gl.constexpr):
    """Starts the product with column `x` of the ring as soon as it is there."""
    ROWS: gl.constexpr = q.shape[0]
    WIDTH: gl.constexpr = ring.shape[1]
    slot = x % SLOTS
    mbarrier.wait(full.index(slot), (x // SLOTS) & 1)
    column = ring.index(slot).permute([1, 0])
    zero = gl.zeros([ROWS, WIDTH], gl.float32, LAYOUT)
    return warpgroup_mma(q, column, zero, use_acc=False, is_async=True)


@gluon.jit
def _largest_products(
    q,
    peak,
    ring,
    full,
    empty,
    multiplied,
    sample,
    first_key,
    block_key,
    row_limit,
    is_cut,
    K_OFFSETS,
    COUNT: gl.constexpr,
    SIZE: gl.constexpr,
    SLOTS: gl.constexpr,
    CAUSAL: gl.constexpr,
    NEGATIVE: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """The larger of `peak` and the products with the next COUNT columns of the ring.

    While the maximum of one is taken the next one is multiplied.

    Args:
        sample: place in the block of the first of them.
        first_key, block_key: first key of the tile, and from there to each of its blocks.
        row_limit: last key that each row sees.
        is_cut: whether a causal mask hides some of the tile.
    """
    product = _start_product(q, ring, full, multiplied, SLOTS, LAYOUT)
    for i in gl.static_range(COUNT):
        if i + 1 < COUNT:
            following = _start_product(q, ring, full, multiplied + i + 1, SLOTS, LAYOUT)
            s = warpgroup_mma_wait(1, deps=[product])
            product = following
        else:
            s = warpgroup_mma_wait(0, deps=[product])
        mbarrier.arrive(empty.index((multiplied + i) % SLOTS), count=1)
        if NEGATIVE:
            s = -s
        if CAUSAL:
            if is_cut:
                reach = row_limit - first_key - _place_in_block(K_OFFSETS, sample + i) * SIZE
                seen = gl.expand_dims(block_key, 0) <= gl.expand_dims(reach, 1)
                s = gl.where(seen, s, float("-inf"))
        peak = gl.maximum(peak, s)
    return peak


@gluon.jit
def _multiply_columns(
    part,
    K_SCALE,
    Q_OFFSETS,
    K_OFFSETS,
    SLAB,
    TOPS,
    heads,
    group_heads,
    k_rows,
    q_len,
    kv_len,
    k_blocks,
    row_tiles,
    items,
    q_tiles,
    ring,
    q_full,
    full,
    empty,
    done,
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
    PART_ROWS: gl.constexpr = q_tiles.shape[1]
    ROWS: gl.constexpr = 2 * PART_ROWS
    WIDTH: gl.constexpr = ring.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    row = gl.arange(0, PART_ROWS, gl.SliceLayout(1, layout))
    lane = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    block_tiles = (k_blocks + WIDTH - 1) // WIDTH
    # Tile after tile, so that the places of a thread differ by constants.
    SLAB += gl.program_id(0).to(gl.int64) * block_tiles * (ROWS * WIDTH)
    in_slab = gl.expand_dims((part * PART_ROWS + row) * WIDTH, 1) + gl.expand_dims(lane, 0)
    TOPS += gl.program_id(0) * (2 * ROWS) + part * PART_ROWS
    multiplied = 0
    taken = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        block, bh, kv_bh, open_tiles, seen_tiles = _item(
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
        side = taken % 2
        q = q_tiles.index(side * 2 + part)
        mbarrier.wait(q_full.index(side), (taken // 2) & 1)
        row_limit = row
        if CAUSAL:
            place = _place_in_block(Q_OFFSETS, row % Q_COUNT)
            in_row = block + part * (Q_BLOCKS // 2) + row // Q_COUNT
            index = in_row * (BLOCK_M // SIZE) + place
            row_limit = gl.minimum(index * SIZE + SIZE, q_len) - 1 + kv_len - q_len
            # Columns past the last key repeat the last real one: who sees that sees all.
            row_limit = gl.where(row_limit >= (k_rows - 1) * SIZE, 1 << 30, row_limit)
        row_max = gl.full([PART_ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, layout))
        # One loop for whole and for cut tiles: with two, ptxas 12.8 forgets the queries' descriptor
        # where the first has no turns.
        for tile in range(seen_tiles):
            key_block = gl.minimum(tile * WIDTH + lane, k_blocks - 1)
            peak = gl.full([PART_ROWS, WIDTH], float("-inf"), gl.float32, layout)
            # Pairs, then the odd one.
            for COUNT in gl.static_range(2, 0, -1):
                first = 0 if COUNT == 2 else K_COUNT - K_COUNT % 2
                for sample in range(first, K_COUNT - K_COUNT % COUNT, COUNT):
                    peak = _largest_products(
                        q,
                        peak,
                        ring,
                        full,
                        empty,
                        multiplied,
                        sample,
                        tile * (WIDTH * BLOCK_N),
                        lane * BLOCK_N,
                        row_limit,
                        tile >= open_tiles,
                        K_OFFSETS,
                        COUNT,
                        SIZE,
                        SLOTS,
                        CAUSAL,
                        NEGATIVE,
                        layout,
                    )
                    multiplied += COUNT
            if K_SCALE is not None:
                factor = gl.load(K_SCALE + kv_bh.to(gl.int64) * k_blocks + key_block)
                peak = peak * gl.expand_dims(factor, 0)
            real = gl.expand_dims(tile * WIDTH + lane < k_blocks, 0)
            peak = gl.where(real, peak, float("-inf"))
            row_max = gl.maximum(row_max, gl.max(peak, 1))
            gl.store(SLAB + tile * (ROWS * WIDTH) + in_slab, peak)
        if CAUSAL:  # a row that sees nothing: its -inf minus 0 gives a score of 0
            row_max = gl.where(row_max == float("-inf"), 0.0, row_max)
        gl.store(TOPS + side * ROWS + row, row_max)
        # One thread arrives for all, when all have written.
        barrier()
        mbarrier.arrive(done.index(side), count=1)
        taken += 1


@gluon.jit
def peak_kernel_hopper(
    q_box,
    k_box,
    Q_SCALE,
    K_SCALE,
    Q_OFFSETS,
    K_OFFSETS,
    SLAB,
    TOPS,
    SCORES,
    logit_factor,
    heads,
    group_heads,
    k_rows,
    q_len,
    kv_len,
    q_blocks,
    k_blocks,
    row_tiles,
    items,
    D: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    SIZE: gl.constexpr,
    Q_COUNT: gl.constexpr,
    Q_BLOCKS: gl.constexpr,
    K_COUNT: gl.constexpr,
    SLOTS: gl.constexpr,
    MULTIPLY_REGISTERS: gl.constexpr,
    COPY_REGISTERS: gl.constexpr,
    CAUSAL: gl.constexpr,
    NEGATIVE: gl.constexpr,
):
    """Grid: any number of programs, at most `items`; arguments as in `scores._peak_kernel`, but

    q_box: descriptor of `[B * H * q_blocks * Q_COUNT, D]`, boxes of half an item's rows.
    k_box: descriptor of `[B * Hk * K_COUNT * k_blocks, D]`, boxes of a column of a tile.
    SLAB: float32 `[programs, tiles, rows, key blocks of a tile]`.
    TOPS: float32 `[programs, 2, rows]`.
    """
    WIDTH: gl.constexpr = k_box.block_shape[0]
    PART_ROWS: gl.constexpr = q_box.block_shape[0]
    STEP_ROWS: gl.constexpr = max(Q_COUNT, 32)
    COLUMNS: gl.constexpr = min(WIDTH, 4096 // STEP_ROWS)
    step_layout: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 1, [1, 0])
    # The rows of two items, half of each for either multiplying warpgroup.
    q_tiles = gl.allocate_shared_memory(q_box.dtype, [4, PART_ROWS, D], q_box.layout)
    ring = gl.allocate_shared_memory(k_box.dtype, [SLOTS, WIDTH, D], k_box.layout)
    # The block maxima of two steps.
    staged = gl.allocate_shared_memory(gl.float32, [2, STEP_ROWS, COLUMNS], step_layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    landed = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    tile_read = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    tile_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    # A copy arrives once, and each multiplying warpgroup.
    for side in gl.static_range(2):
        mbarrier.init(q_full.index(side), count=1)
        mbarrier.init(done.index(side), count=2)
        mbarrier.init(landed.index(side), count=32 * SCORE_WARPS)  # each of their threads
        mbarrier.init(tile_read.index(side), count=1)
        mbarrier.init(tile_free.index(side), count=1)
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
    gl.warp_specialize(
        [
            (
                _multiply_columns,
                (
                    0,
                    K_SCALE,
                    Q_OFFSETS,
                    K_OFFSETS,
                    SLAB,
                    TOPS,
                    heads,
                    group_heads,
                    k_rows,
                    q_len,
                    kv_len,
                    k_blocks,
                    row_tiles,
                    items,
                    q_tiles,
                    ring,
                    q_full,
                    full,
                    empty,
                    done,
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
                    K_SCALE,
                    Q_OFFSETS,
                    K_OFFSETS,
                    SLAB,
                    TOPS,
                    heads,
                    group_heads,
                    k_rows,
                    q_len,
                    kv_len,
                    k_blocks,
                    row_tiles,
                    items,
                    q_tiles,
                    ring,
                    q_full,
                    full,
                    empty,
                    done,
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
                _copy,
                (
                    q_box,
                    k_box,
                    heads,
                    group_heads,
                    q_len,
                    kv_len,
                    q_blocks,
                    k_blocks,
                    row_tiles,
                    items,
                    q_tiles,
                    ring,
                    q_full,
                    full,
                    empty,
                    tile_free,
                    tile_read,
                    BLOCK_M,
                    BLOCK_N,
                    Q_COUNT,
                    Q_BLOCKS,
                    K_COUNT,
                    SLOTS,
                    CAUSAL,
                ),
            ),
            (
                _make_scores,
                (
                    Q_SCALE,
                    SLAB,
                    TOPS,
                    SCORES,
                    logit_factor,
                    heads,
                    group_heads,
                    q_len,
                    kv_len,
                    q_blocks,
                    k_blocks,
                    row_tiles,
                    items,
                    staged,
                    done,
                    landed,
                    tile_free,
                    tile_read,
                    2 * PART_ROWS,
                    WIDTH,
                    BLOCK_M,
                    BLOCK_N,
                    Q_COUNT,
                    Q_BLOCKS,
                    CAUSAL,
                ),
            ),
        ],
        [4, 4 - SCORE_WARPS, SCORE_WARPS],
        [MULTIPLY_REGISTERS, COPY_REGISTERS, COPY_REGISTERS],
    )


def launch(
    q: Tensor, k: Tensor, arguments: tuple, programs: int, config: HopperScoreConfig, **constants
) -> None:
    """Run the kernel.

    Args:
        q: rows of whole blocks, `[B, H, q_blocks * Q_COUNT, D]`, contiguous.
        k: keys by place, `[B, Hk, K_COUNT * k_blocks, D]`, contiguous.
        arguments: the run-time arguments of `peak_kernel_hopper` after k_box.
    """
    launch_kernel(
        peak_kernel_hopper,
        (programs,),
        row_boxes(q, config.rows // 2),
        row_boxes(k, config.columns),
        *arguments,
        D=k.shape[-1],
        SLOTS=config.slots,
        MULTIPLY_REGISTERS=config.multiply_registers,
        COPY_REGISTERS=config.copy_registers,
        num_warps=4,
        **constants,
    )
