"""Those who make scores: exp of each block's largest product below that of its row, when an item is
done."""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier

from psa_torch._triton.gluon import barrier, copy_async
from psa_torch._triton.rings import stage_of, tile_of, wait_empty, wait_full, wait_turn
from psa_torch.kernels.scores.hopper.schedule import open_item, tiles_of

SCORE_WARPS = gl.constexpr(2)
"""Warps that make scores; the other two of their warpgroup copy."""


class Scores(NamedTuple):
    """What is written, and what turns distances into it.

    Attributes:
        q_scale: pointer to a factor for each query block, or None for 1.
        pointer: float32 `[B, H, q_blocks, k_blocks]`.
        logit_factor: factor on products, in powers of 2.
    """

    q_scale: object
    pointer: object
    logit_factor: object


class Maxima(NamedTuple):
    """Pointers to the maxima of one item: of its rows by key block, and in all."""

    by_block: object
    tops: object


@gluon.jit
def _step_origin(
    x, STEP_ROWS: gl.constexpr, COLUMNS: gl.constexpr, ROWS: gl.constexpr, WIDTH: gl.constexpr
):
    """(tile, row in the item, key block in the tile) where step `x` begins: all rows of a tile,
    then the next."""
    PIECES: gl.constexpr = WIDTH // COLUMNS
    STEPS: gl.constexpr = ROWS // STEP_ROWS * PIECES
    return x // STEPS, x % STEPS // PIECES * STEP_ROWS, x % PIECES * COLUMNS


@gluon.jit
def _fetch_step(by_block, x, staged, ROWS: gl.constexpr, WIDTH: gl.constexpr):
    """Starts to copy the block maxima of step `x` of an item."""
    STEP_ROWS: gl.constexpr = staged.tiles.shape[1]
    COLUMNS: gl.constexpr = staged.tiles.shape[2]
    layout: gl.constexpr = gl.BlockedLayout(
        [1, 4], [128 // COLUMNS, COLUMNS // 4], [SCORE_WARPS, 1], [1, 0]
    )
    tile, row, column = _step_origin(x, STEP_ROWS, COLUMNS, ROWS, WIDTH)
    rows = row + gl.arange(0, STEP_ROWS, gl.SliceLayout(1, layout))
    columns = column + gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
    at = gl.expand_dims(rows * WIDTH, 1) + gl.expand_dims(columns, 0)
    copy_async(tile_of(staged, x), by_block + tile * (ROWS * WIDTH) + at)
    async_copy.mbarrier_arrive(staged.full.index(stage_of(staged, x)), increment_count=False)


@gluon.jit
def _score_step(
    x,
    steps,
    item,
    maxima,
    scores,
    sizes,
    staged,
    ROWS: gl.constexpr,
    WIDTH: gl.constexpr,
    Q_COUNT: gl.constexpr,
):
    """Step `x` of an item: the scores of one query block, or of a few with few rows, with COLUMNS
    key blocks.

    Args:
        steps: steps of what the item's rows see; the scores after these are 0.
    """
    STEP_ROWS: gl.constexpr = staged.tiles.shape[1]
    COLUMNS: gl.constexpr = staged.tiles.shape[2]
    BLOCKS: gl.constexpr = STEP_ROWS // Q_COUNT
    # A thread has whole columns: nothing is exchanged.
    layout: gl.constexpr = gl.BlockedLayout([STEP_ROWS, 1], [1, 32], [1, SCORE_WARPS], [0, 1])
    out_layout: gl.constexpr = gl.BlockedLayout([BLOCKS, 1], [1, 32], [1, SCORE_WARPS], [0, 1])
    q_blocks, k_blocks = sizes.q_blocks, sizes.k_blocks
    tile, first_row, column = _step_origin(x, STEP_ROWS, COLUMNS, ROWS, WIDTH)
    query_block = first_row // Q_COUNT + gl.arange(0, BLOCKS, gl.SliceLayout(1, out_layout))
    query_block += item.block
    row = item.batch_head.to(gl.int64) * q_blocks + gl.minimum(query_block, q_blocks - 1)
    factor = gl.full([BLOCKS], 1.0, gl.float32, gl.SliceLayout(1, out_layout)) * scores.logit_factor
    if scores.q_scale is not None:
        factor *= gl.load(scores.q_scale + row)
    below = gl.full([BLOCKS, COLUMNS], float("-inf"), gl.float32, out_layout)
    if x < steps:
        if x + 1 < steps:
            _fetch_step(maxima.by_block, x + 1, staged, ROWS, WIDTH)
        top = gl.load(maxima.tops + first_row + gl.arange(0, STEP_ROWS, gl.SliceLayout(1, layout)))
        wait_full(staged, x)
        distance = tile_of(staged, x).load(layout) - gl.expand_dims(top, 1)
        by_block = gl.max(distance.reshape([BLOCKS, Q_COUNT, COLUMNS]), 1)
        below = gl.convert_layout(by_block, out_layout)
    key_block = tile * WIDTH + column + gl.arange(0, COLUMNS, gl.SliceLayout(0, out_layout))
    gl.store(
        scores.pointer + gl.expand_dims(row * k_blocks, 1) + gl.expand_dims(key_block, 0),
        gl.exp2(below * gl.expand_dims(factor, 1)),
        mask=gl.expand_dims(query_block < q_blocks, 1) & gl.expand_dims(key_block < k_blocks, 0),
    )
    # All have read before the next step is staged here.
    barrier()


@gluon.jit
def make_scores(
    scores,
    slab,
    sizes,
    staged,
    ROWS: gl.constexpr,
    WIDTH: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    Q_COUNT: gl.constexpr,
    IS_CAUSAL: gl.constexpr,
):
    """The scores of each item when it is done.

    Args:
        staged: places for the block maxima of two steps; nobody waits until they are free.
        ROWS, WIDTH: rows of an item, key blocks of a tile.
    """
    # A multiple of four: every item begins in the same place and phase.
    STEPS: gl.constexpr = ROWS * WIDTH // (staged.tiles.shape[1] * staged.tiles.shape[2])
    block_tiles = tiles_of(sizes, WIDTH)
    by_block = slab.maxima + gl.program_id(0).to(gl.int64) * block_tiles * (ROWS * WIDTH)
    tops = slab.tops + gl.program_id(0) * (2 * ROWS)
    taken = 0
    for number in range(gl.program_id(0), sizes.items, gl.num_programs(0)):
        item = open_item(number, sizes, ROWS // Q_COUNT, WIDTH, BLOCK_M, BLOCK_N, IS_CAUSAL)
        steps = item.seen_tiles * STEPS
        side = taken % 2
        wait_turn(slab.done, taken)
        if steps > 0:
            _fetch_step(by_block, 0, staged, ROWS, WIDTH)
        for tile in range(block_tiles):
            for x in range(tile * STEPS, (tile + 1) * STEPS):
                maxima = Maxima(by_block, tops + side * ROWS)
                _score_step(x, steps, item, maxima, scores, sizes, staged, ROWS, WIDTH, Q_COUNT)
            if number + gl.num_programs(0) < sizes.items:
                # No more than two tiles ahead of those who copy, who could not tell more from none.
                read = taken * block_tiles + tile
                wait_empty(slab.reads, read)
                mbarrier.arrive(slab.reads.full.index(stage_of(slab.reads, read)), count=1)
        taken += 1
