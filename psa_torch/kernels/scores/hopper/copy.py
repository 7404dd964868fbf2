"""Those who copy: for every item its rows, and for every tile of key blocks one column of each at a
time."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from psa_torch._triton.gluon import load_async
from psa_torch._triton.rings import release, stage_of, wait_empty, wait_full
from psa_torch.kernels.scores.hopper.schedule import open_item, tiles_of


@gluon.jit
def copy_items(
    boxes,
    sizes,
    queries,
    columns,
    slab,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    Q_COUNT: gl.constexpr,
    K_COUNT: gl.constexpr,
    IS_CAUSAL: gl.constexpr,
):
    """The rows of every item into `queries`, its columns into the ring `columns`.

    What lies past the last query or key block belongs to the next head or column, or is zero.

    Args:
        boxes: descriptors of the rows and of the columns.
    """
    q_box, k_box = boxes
    PART_ROWS: gl.constexpr = queries.tiles.shape[1]
    Q_BLOCKS: gl.constexpr = 2 * PART_ROWS // Q_COUNT
    WIDTH: gl.constexpr = columns.tiles.shape[1]
    Q_BYTES: gl.constexpr = 2 * PART_ROWS * columns.tiles.shape[2] * 2
    block_tiles = tiles_of(sizes, WIDTH)
    loaded = 0
    taken = 0
    for number in range(gl.program_id(0), sizes.items, gl.num_programs(0)):
        item = open_item(number, sizes, Q_BLOCKS, WIDTH, BLOCK_M, BLOCK_N, IS_CAUSAL)
        side = stage_of(queries, taken)
        # Whose place these rows take is an item that has its scores.
        mbarrier.expect(queries.full.index(side), Q_BYTES)
        for part in gl.static_range(2):
            row = (item.batch_head * sizes.q_blocks + item.block) * Q_COUNT + part * PART_ROWS
            place = queries.tiles.index(side * 2 + part)
            load_async(q_box, [row, 0], queries.full.index(side), place)
        for tile in range(block_tiles):
            if tile < item.seen_tiles:
                for sample in range(K_COUNT - 1):
                    row = (item.kv_head * K_COUNT + sample) * sizes.k_blocks + tile * WIDTH
                    _load_column(k_box, row, loaded, columns)
                    loaded += 1
            if taken > 0:
                # The item before has left this tile of the slab.
                read = (taken - 1) * block_tiles + tile
                wait_full(slab.reads, read)
                release(slab.reads, read)
            if tile < item.seen_tiles:
                row = (item.kv_head * K_COUNT + K_COUNT - 1) * sizes.k_blocks + tile * WIDTH
                _load_column(k_box, row, loaded, columns)
                loaded += 1
        taken += 1


@gluon.jit
def _load_column(k_box, row, loaded, columns):
    """Brings the `loaded`-th column to its place in the ring once that is free."""
    BYTES: gl.constexpr = columns.tiles.shape[1] * columns.tiles.shape[2] * 2
    stage = stage_of(columns, loaded)
    wait_empty(columns, loaded)
    mbarrier.expect(columns.full.index(stage), BYTES)
    load_async(k_box, [row, 0], columns.full.index(stage), columns.tiles.index(stage))
