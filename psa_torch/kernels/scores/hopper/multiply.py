"""Those who multiply: half of the rows of every item with one column of the key blocks after the
other."""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait

from psa_torch._triton.gluon import barrier
from psa_torch._triton.products import start_when_full
from psa_torch._triton.rings import release, stage_of, wait_full
from psa_torch.kernels.scores.hopper.schedule import open_item, tiles_of
from psa_torch.kernels.scores.samples import place_in_block


class Keys(NamedTuple):
    """What belongs to the keys, and where samples were taken.

    Attributes:
        scale: pointer to a factor for each key block, or None for 1.
        q_offsets, k_offsets: pointers to the sampled rows of a block, or None for all.
    """

    scale: object
    q_offsets: object
    k_offsets: object


class Mask(NamedTuple):
    """What causality hides of one tile.

    Attributes:
        first_key, block_key: first key of the tile, and from there to each of its blocks.
        row_limit: last key that each row sees.
        is_cut: whether some of the tile is hidden.
    """

    first_key: object
    block_key: object
    row_limit: object
    is_cut: object


@gluon.jit
def _largest_products(
    q,
    peak,
    columns,
    multiplied,
    sample,
    mask,
    k_offsets,
    COUNT: gl.constexpr,
    SIZE: gl.constexpr,
    IS_CAUSAL: gl.constexpr,
    NEGATE: gl.constexpr,
):
    """The larger of `peak` and the products with the next COUNT columns of the ring.

    While the maximum of one is taken the next one is multiplied.

    Args:
        multiplied: columns that went through the ring before.
        sample: place in the block of the first of them.
        mask: the `Mask` of the tile.
    """
    LAYOUT: gl.constexpr = peak.type.layout
    product = start_when_full(q, columns, multiplied, LAYOUT, False)
    for i in gl.static_range(COUNT):
        if i + 1 < COUNT:
            following = start_when_full(q, columns, multiplied + i + 1, LAYOUT, False)
            s = warpgroup_mma_wait(1, deps=[product])
            product = following
        else:
            s = warpgroup_mma_wait(0, deps=[product])
        release(columns, multiplied + i)
        if NEGATE:
            s = -s
        if IS_CAUSAL:
            if mask.is_cut:
                reach = mask.row_limit - mask.first_key
                reach = reach - place_in_block(k_offsets, sample + i) * SIZE
                seen = gl.expand_dims(mask.block_key, 0) <= gl.expand_dims(reach, 1)
                s = gl.where(seen, s, float("-inf"))
        peak = gl.maximum(peak, s)
    return peak


@gluon.jit
def multiply_columns(
    part,
    shared,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    SIZE: gl.constexpr,
    Q_COUNT: gl.constexpr,
    K_COUNT: gl.constexpr,
    IS_CAUSAL: gl.constexpr,
    NEGATE: gl.constexpr,
):
    """One multiplying warpgroup: half of the query blocks of every item.

    Args:
        shared: `Keys`, `Slab`, `Sizes`, and the rings of queries and of columns.
    """
    keys, slab, sizes, queries, columns = shared
    PART_ROWS: gl.constexpr = queries.tiles.shape[1]
    ROWS: gl.constexpr = 2 * PART_ROWS
    Q_BLOCKS: gl.constexpr = ROWS // Q_COUNT
    WIDTH: gl.constexpr = columns.tiles.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    q_len, kv_len, k_blocks = sizes.q_len, sizes.kv_len, sizes.k_blocks
    row = gl.arange(0, PART_ROWS, gl.SliceLayout(1, layout))
    lane = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    block_tiles = tiles_of(sizes, WIDTH)
    # Tile after tile, so that the places of a thread differ by constants.
    maxima = slab.maxima + gl.program_id(0).to(gl.int64) * block_tiles * (ROWS * WIDTH)
    in_tile = gl.expand_dims((part * PART_ROWS + row) * WIDTH, 1) + gl.expand_dims(lane, 0)
    tops = slab.tops + (gl.program_id(0) * (2 * ROWS) + part * PART_ROWS)
    multiplied = 0
    taken = 0
    for number in range(gl.program_id(0), sizes.items, gl.num_programs(0)):
        item = open_item(number, sizes, Q_BLOCKS, WIDTH, BLOCK_M, BLOCK_N, IS_CAUSAL)
        side = stage_of(queries, taken)
        q = queries.tiles.index(side * 2 + part)
        wait_full(queries, taken)
        row_limit = row
        if IS_CAUSAL:
            place = place_in_block(keys.q_offsets, row % Q_COUNT)
            in_row = item.block + part * (Q_BLOCKS // 2) + row // Q_COUNT
            index = in_row * (BLOCK_M // SIZE) + place
            row_limit = gl.minimum(index * SIZE + SIZE, q_len) - 1 + kv_len - q_len
            # Columns past the last key repeat the last real one: who sees that sees all.
            row_limit = gl.where(row_limit >= (sizes.k_rows - 1) * SIZE, 1 << 30, row_limit)
        row_max = gl.full([PART_ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, layout))
        # One loop for whole and for cut tiles: with two, ptxas 12.8 forgets the queries' descriptor
        # where the first has no turns.
        for tile in range(item.seen_tiles):
            key_block = gl.minimum(tile * WIDTH + lane, k_blocks - 1)
            peak = gl.full([PART_ROWS, WIDTH], float("-inf"), gl.float32, layout)
            # Pairs, then the odd one.
            for COUNT in gl.static_range(2, 0, -1):
                first = 0 if COUNT == 2 else K_COUNT - K_COUNT % 2
                for sample in range(first, K_COUNT - K_COUNT % COUNT, COUNT):
                    peak = _largest_products(
                        q,
                        peak,
                        columns,
                        multiplied,
                        sample,
                        Mask(
                            tile * (WIDTH * BLOCK_N),
                            lane * BLOCK_N,
                            row_limit,
                            tile >= item.open_tiles,
                        ),
                        keys.k_offsets,
                        COUNT,
                        SIZE,
                        IS_CAUSAL,
                        NEGATE,
                    )
                    multiplied += COUNT
            if keys.scale is not None:
                factor = gl.load(keys.scale + item.kv_head.to(gl.int64) * k_blocks + key_block)
                peak = peak * gl.expand_dims(factor, 0)
            real = gl.expand_dims(tile * WIDTH + lane < k_blocks, 0)
            peak = gl.where(real, peak, float("-inf"))
            row_max = gl.maximum(row_max, gl.max(peak, 1))
            gl.store(maxima + tile * (ROWS * WIDTH) + in_tile, peak)
        if IS_CAUSAL:  # a row that sees nothing: its -inf minus 0 gives a score of 0
            row_max = gl.where(row_max == float("-inf"), 0.0, row_max)
        gl.store(tops + side * ROWS + row, row_max)
        # One thread arrives for all, when all have written.
        barrier()
        mbarrier.arrive(slab.done.index(side), count=1)
        taken += 1
