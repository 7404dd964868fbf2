"""The kernel and its launch: who does what, and the memory that they share."""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from psa_torch._triton.boxes import row_boxes
from psa_torch._triton.launch import launch_kernel
from psa_torch._triton.rings import Ring, new_barriers
from psa_torch.kernels._launch import resident_programs
from psa_torch.kernels.scores.hopper.copy import copy_items
from psa_torch.kernels.scores.hopper.multiply import Keys, multiply_columns
from psa_torch.kernels.scores.hopper.ratios import SCORE_WARPS, Scores, make_scores
from psa_torch.kernels.scores.hopper.schedule import Sizes, Slab
from psa_torch.kernels.scores.samples import Samples
from psa_torch.kernels.scores.tiles import HOPPER_ROWS, HopperScoreConfig
from shared_specs.geometry import cdiv

MULTIPLY_REGISTERS = gl.constexpr(224)
COPY_REGISTERS = gl.constexpr(56)
"""Per thread of each role, multiples of 8: two multiplying warpgroups and one that copies and makes
scores share 504."""


@gluon.jit
def peak_kernel_hopper(
    q_box,
    k_box,
    q_scale,
    k_scale,
    q_offsets,
    k_offsets,
    slab,
    tops,
    scores,
    logit_factor,
    heads,
    group,
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
    K_COUNT: gl.constexpr,
    STAGES: gl.constexpr,
    IS_CAUSAL: gl.constexpr,
    NEGATE: gl.constexpr,
):
    """Grid: any number of programs, at most `items`; arguments as in `peaks._peak_kernel`, but

    q_box: descriptor of `[B * H * q_blocks * Q_COUNT, D]`, boxes of half an item's rows.
    k_box: descriptor of `[B * Hk * K_COUNT * k_blocks, D]`, boxes of a column of a tile.
    slab: float32 `[programs, tiles, rows, key blocks of a tile]`.
    tops: float32 `[programs, 2, rows]`.
    """
    WIDTH: gl.constexpr = k_box.block_shape[0]
    PART_ROWS: gl.constexpr = q_box.block_shape[0]
    STEP_ROWS: gl.constexpr = max(Q_COUNT, 32)
    COLUMNS: gl.constexpr = min(WIDTH, 4096 // STEP_ROWS)
    step_layout: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 1, [1, 0])
    # The rows of two items, half of each for either multiplying warpgroup.
    q_tiles = gl.allocate_shared_memory(q_box.dtype, [4, PART_ROWS, D], q_box.layout)
    k_tiles = gl.allocate_shared_memory(k_box.dtype, [STAGES, WIDTH, D], k_box.layout)
    # The block maxima of two steps.
    steps = gl.allocate_shared_memory(gl.float32, [2, STEP_ROWS, COLUMNS], step_layout)
    queries = Ring(q_tiles, new_barriers(2), None)
    columns = Ring(k_tiles, new_barriers(STAGES), new_barriers(STAGES))
    done = new_barriers(2)
    staged = Ring(steps, new_barriers(2), None)
    reads = Ring(None, new_barriers(2), new_barriers(2))
    # A copy arrives once, and each multiplying warpgroup.
    for side in gl.static_range(2):
        mbarrier.init(queries.full.index(side), count=1)
        mbarrier.init(done.index(side), count=2)
        mbarrier.init(staged.full.index(side), count=32 * SCORE_WARPS)  # each of their threads
        mbarrier.init(reads.full.index(side), count=1)
        mbarrier.init(reads.empty.index(side), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(columns.full.index(stage), count=1)
        mbarrier.init(columns.empty.index(stage), count=2)

    sizes = Sizes(heads, group, k_rows, q_len, kv_len, q_blocks, k_blocks, row_tiles, items)
    keys = Keys(k_scale, q_offsets, k_offsets)
    maxima = Slab(slab, tops, done, reads)
    made = Scores(q_scale, scores, logit_factor)
    multiplied = (keys, maxima, sizes, queries, columns)
    boxes = (q_box, k_box)
    ROWS: gl.constexpr = 2 * PART_ROWS
    gl.warp_specialize(
        [
            (
                multiply_columns,
                (0, multiplied, BLOCK_M, BLOCK_N, SIZE, Q_COUNT, K_COUNT, IS_CAUSAL, NEGATE),
            ),
            (
                multiply_columns,
                (1, multiplied, BLOCK_M, BLOCK_N, SIZE, Q_COUNT, K_COUNT, IS_CAUSAL, NEGATE),
            ),
            (
                copy_items,
                (
                    boxes,
                    sizes,
                    queries,
                    columns,
                    maxima,
                    BLOCK_M,
                    BLOCK_N,
                    Q_COUNT,
                    K_COUNT,
                    IS_CAUSAL,
                ),
            ),
            (
                make_scores,
                (made, maxima, sizes, staged, ROWS, WIDTH, BLOCK_M, BLOCK_N, Q_COUNT, IS_CAUSAL),
            ),
        ],
        [4, 4 - SCORE_WARPS, SCORE_WARPS],
        [MULTIPLY_REGISTERS, COPY_REGISTERS, COPY_REGISTERS],
    )


def launch(
    q: Samples, k: Samples, scores: Tensor, numbers: tuple, tile: HopperScoreConfig, **constants
) -> None:
    """Run the kernel.

    Args:
        q, k: samples that are gathered (see `samples.Samples`).
        scores: float32 `[B, H, q_blocks, k_blocks]`, to be written.
        numbers: the kernel's `logit_factor`, `heads` and `group`.
        constants: those of the kernel that `peaks._peak_kernel` has too.
    """
    batch, heads, q_blocks, k_blocks = scores.shape
    row_tiles = cdiv(q_blocks, HOPPER_ROWS // q.per_block)
    items = row_tiles * batch * heads
    # Shared memory holds one program per multiprocessor.
    programs = min(items, resident_programs(scores, 1))
    scratch = dict(dtype=torch.float32, device=scores.device)
    tiles = cdiv(k_blocks, tile.columns)
    launch_kernel(
        peak_kernel_hopper,
        (programs,),
        row_boxes(q.values, HOPPER_ROWS // 2, q.values.shape[-1]),
        row_boxes(k.values, tile.columns, k.values.shape[-1]),
        q.scale,
        k.scale,
        q.offsets,
        k.offsets,
        torch.empty(programs, tiles, HOPPER_ROWS, tile.columns, **scratch),
        torch.empty(programs, 2, HOPPER_ROWS, **scratch),
        scores,
        *numbers,
        cdiv(k.length, k.size),
        q.length,
        k.length,
        q_blocks,
        k_blocks,
        row_tiles,
        items,
        D=k.values.shape[-1],
        STAGES=tile.stages,
        num_warps=4,
        **constants,
    )
