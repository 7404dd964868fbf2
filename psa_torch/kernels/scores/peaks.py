"""Block scores `pooled` and `sampled` (specification, section 5).

    scores[i, j] = max over rows of exp(block_max[row, j] - row_max[row])

Rows are grouped means or sampled tokens. A program takes ROWS of them, walks all columns once
with one product per tile, keeps the maximum over each key block in a slab of float32 scratch and
the running row maximum in registers; then it walks its slab once. The exponential is monotone, so
only the largest difference of a (query block, key block) pair is exponentiated.

Counts at 75,600 tokens, 24 heads, D = 128, `importance_pool` 4 (18,900 rows and columns), for the
choice between storing block maxima and computing the products twice:

    product                 2.19 TFLOP a pass; 3.7 ms at 600 TFLOP/s, so one pass only
    slab                    2.1 GB written and read back, by the processor that wrote it; a program
                            reuses its slab for every item, so 264 programs hold 160 MB instead of
                            2.1 GB and much of it stays in L2: 0.9 ms of memory time at the worst,
                            beside another program's products
    columns                 128 rows a program: 17 GB from L2, 4.8 MB a head from memory
    pooling q and k         0.93 GB read, 0.23 GB written: 0.24 ms
    scores                  67 MB written

Means of 16-bit inputs are kept in float16 scaled by a power of two per block, at the speed of
bfloat16 with eight times its precision: on random tokens (2,048 of them, 4 heads, bfloat16) 0.07 %
of the blocks get another level than from exact means, and 0.57 % with means rounded to bfloat16.
Scaling keeps any finite input inside float16's range and is exact; it costs one product per block
maximum.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from psa_torch._triton.constants import LOG2E
from psa_torch._triton.launch import launch_kernel
from psa_torch.kernels._launch import (
    max_inner,
    next_power_of_2,
    on_device_of,
    padded_head_dim,
    resident_programs,
)
from psa_torch.kernels.scores.samples import (
    Samples,
    gathered_keys,
    gathered_queries,
    mean_samples,
    place_in_block,
    token_samples,
)
from psa_torch.kernels.scores.tiles import HopperScoreConfig, ScoreConfig, peak_tile
from shared_specs.config import PSAConfig
from shared_specs.geometry import cdiv

# Smallest factor on a logit difference: scale 0 must not turn a hidden block's -inf into NaN.
_LEAST_SCALE = 1e-30


def pooled_scores(q: Tensor, k: Tensor, config: PSAConfig) -> Tensor:
    """Rows and columns are means over groups of `importance_pool` tokens; see `block_scores`."""
    size = config.importance_pool
    tile = peak_tile(q, k, config.block_m // size, config)
    rows = mean_samples(q, config.block_m, size, by_place=False)
    by_place = isinstance(tile, HopperScoreConfig)
    columns = mean_samples(k, config.block_n, size, by_place=by_place)
    return _peak_scores(rows, columns, tile, config)


def sampled_scores(q: Tensor, k: Tensor, config: PSAConfig) -> Tensor:
    """Rows and columns are tokens at fixed offsets of each block; see `block_scores`."""
    q_plan, k_plan = config.query_samples, config.key_samples
    rows, columns = token_samples(q, q_plan), token_samples(k, k_plan)
    tile = peak_tile(q, k, rows.per_block, config)
    if isinstance(tile, HopperScoreConfig):
        rows, columns = gathered_queries(rows, q_plan), gathered_keys(columns, k_plan)
    return _peak_scores(rows, columns, tile, config)


def _peak_scores(
    q: Samples, k: Samples, tile: ScoreConfig | HopperScoreConfig, config: PSAConfig
) -> Tensor:
    batch, heads, _, head_dim = q.values.shape
    scale = config.resolved_scale(head_dim)
    q_blocks, k_blocks = cdiv(q.length, q.block), cdiv(k.length, k.block)
    scores = torch.empty(
        batch, heads, q_blocks, k_blocks, dtype=torch.float32, device=q.values.device
    )
    numbers = (
        max(abs(scale), _LEAST_SCALE) * LOG2E.value,
        heads,
        heads // k.values.shape[1],
    )
    constants = dict(
        BLOCK_M=q.block,
        BLOCK_N=k.block,
        SIZE=q.size,
        Q_COUNT=q.per_block,
        K_COUNT=k.per_block,
        IS_CAUSAL=config.causal,
        NEGATE=scale < 0,
    )
    if isinstance(tile, HopperScoreConfig):
        # Triton's interpreter does not know Gluon: nothing else may import it.
        from psa_torch.kernels.scores.hopper.kernel import launch
    else:
        launch = _launch
    with on_device_of(q.values):
        launch(q, k, scores, numbers, tile, **constants)
    return scores


def _launch(
    q: Samples, k: Samples, scores: Tensor, numbers: tuple, tile: ScoreConfig, **constants
) -> None:
    batch, heads, q_blocks, k_blocks = scores.shape
    q_rows, head_dim = q.values.shape[2:]
    rows = max(tile.rows, q.per_block)
    # A tensor-core product has at least 16 columns.
    key_blocks = min(tile.columns, max(16, next_power_of_2(k_blocks)))
    row_tiles = cdiv(q_blocks, rows // q.per_block)
    items = row_tiles * batch * heads
    programs = min(items, resident_programs(q.values, tile.per_processor))
    sweep = max(64, key_blocks)
    width = cdiv(k_blocks, sweep) * sweep
    launch_kernel(
        _peak_kernel,
        (programs,),
        q.values,
        k.values,
        q.scale,
        k.scale,
        q.offsets,
        k.offsets,
        torch.empty(programs, rows, width, dtype=torch.float32, device=scores.device),
        scores,
        *q.values.stride(),
        *k.values.stride(),
        *numbers,
        q_rows,
        cdiv(k.length, k.size),
        q.length,
        k.length,
        q_blocks,
        k_blocks,
        row_tiles,
        items,
        width,
        HEAD_DIM=head_dim,
        BLOCK_D=padded_head_dim(head_dim),
        ROWS=rows,
        K_BLOCKS=key_blocks,
        SWEEP=sweep,
        PRECISION="ieee" if q.values.dtype == torch.float32 else "tf32",
        STAGES=tile.stages,
        num_warps=tile.warps,
        **constants,
    )


@triton.jit
def _peak_kernel(
    q_pointer,
    k_pointer,
    q_scale,
    k_scale,
    q_offsets,
    k_offsets,
    slab,
    scores,
    q_stride_b,
    q_stride_h,
    q_stride_l,
    q_stride_d,
    k_stride_b,
    k_stride_h,
    k_stride_l,
    k_stride_d,
    logit_factor,
    heads,
    group,
    q_rows,
    k_rows,
    q_len,
    kv_len,
    q_blocks,
    k_blocks,
    row_tiles,
    items,
    width,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SIZE: tl.constexpr,
    Q_COUNT: tl.constexpr,
    K_COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    K_BLOCKS: tl.constexpr,
    SWEEP: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    NEGATE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid: any number of programs; item = (batch * heads, tile of ROWS rows).

    Rows, columns and key blocks past the last real one are clamped to it: repeats change no
    maximum, so nothing but causality needs a mask.
    """
    Q_BLOCKS: tl.constexpr = ROWS // Q_COUNT  # query blocks per item
    row = tl.arange(0, ROWS)
    tile_block = tl.arange(0, K_BLOCKS)
    swept = tl.arange(0, SWEEP)
    item_block = tl.arange(0, Q_BLOCKS)
    d = tl.arange(0, BLOCK_D)
    row_in_item = (row // Q_COUNT) * (BLOCK_M // SIZE) + place_in_block(q_offsets, row % Q_COUNT)
    slab += tl.program_id(0).to(tl.int64) * ROWS * width
    slab_row = slab + row[:, None] * width.to(tl.int64)
    block_tiles = tl.cdiv(k_blocks, K_BLOCKS)

    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        # Under causality the last rows see most: they come first.
        block = (row_tiles - 1 - item % row_tiles) * Q_BLOCKS
        batch_head = (item // row_tiles).to(tl.int64)
        kv_head = (batch_head // heads) * (heads // group) + (batch_head % heads) // group
        q_head = q_pointer + (batch_head // heads) * q_stride_b + (batch_head % heads) * q_stride_h
        k_head = (
            k_pointer
            + (batch_head // heads) * k_stride_b
            + ((batch_head % heads) // group) * k_stride_h
        )
        q_index = tl.minimum(block * (BLOCK_M // SIZE) + row_in_item, q_rows - 1)
        q = _load_rows(q_head, q_index, d, q_stride_l, q_stride_d, HEAD_DIM, BLOCK_D)
        row_max = tl.full([ROWS], float("-inf"), tl.float32)
        row_position = tl.minimum(q_index * SIZE + SIZE, q_len) - 1 + kv_len - q_len

        open_tiles = block_tiles  # tiles of key blocks that every row sees whole
        seen_tiles = block_tiles  # tiles of which some row sees a column
        if IS_CAUSAL:
            first_position = block * BLOCK_M + kv_len - q_len
            last_position = tl.minimum((block + Q_BLOCKS) * BLOCK_M, q_len) - 1 + kv_len - q_len
            tile_keys: tl.constexpr = K_BLOCKS * BLOCK_N
            open_tiles = tl.minimum(tl.maximum(first_position + 1, 0) // tile_keys, block_tiles)
            seen_tiles = tl.minimum(
                tl.cdiv(tl.maximum(last_position + 1, 0), tile_keys), block_tiles
            )
        for MASKED in tl.static_range(2 if IS_CAUSAL else 1):
            first_tile = open_tiles if MASKED else 0
            for tile in range(first_tile, seen_tiles if MASKED else open_tiles):
                key_block = tl.minimum(tile * K_BLOCKS + tile_block, k_blocks - 1)
                peak = tl.full([ROWS, K_BLOCKS], float("-inf"), tl.float32)
                # One column of every key block at a time: the largest product of a block is then
                # a maximum of accumulators, element by element, with no exchange of threads.
                for place in tl.range(0, K_COUNT, num_stages=STAGES):
                    index = key_block * (BLOCK_N // SIZE) + place_in_block(k_offsets, place)
                    index = tl.minimum(index, k_rows - 1)
                    k = _load_rows(k_head, index, d, k_stride_l, k_stride_d, HEAD_DIM, BLOCK_D)
                    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                    if NEGATE:
                        s = -s
                    if MASKED:
                        s = tl.where(
                            (index * SIZE)[None, :] <= row_position[:, None], s, float("-inf")
                        )
                    peak = tl.maximum(peak, s)
                peak *= _block_factors(k_scale, kv_head, key_block, k_blocks)[None, :]
                row_max = tl.maximum(row_max, tl.max(peak, 1))
                tl.store(slab_row + (tile * K_BLOCKS + tile_block)[None, :], peak)

        # The slab was written by other threads of this program.
        tl.debug_barrier()
        if IS_CAUSAL:  # a row that sees nothing: its -inf minus 0 gives a score of 0
            row_max = tl.where(row_max == float("-inf"), 0.0, row_max)
        row_factor = logit_factor * _block_factors(
            q_scale, batch_head, block + row // Q_COUNT, q_blocks
        )
        seen_blocks = tl.minimum(seen_tiles * K_BLOCKS, k_blocks)
        out = batch_head * q_blocks + (block + item_block).to(tl.int64)
        for start in range(0, k_blocks, SWEEP):
            at = start + swept
            peak = tl.load(
                slab_row + at[None, :], mask=(at < seen_blocks)[None, :], other=float("-inf")
            )
            below = (peak - row_max[:, None]) * row_factor[:, None]
            score = tl.exp2(max_inner(below, Q_BLOCKS, Q_COUNT, SWEEP))
            tl.store(
                scores + out[:, None] * k_blocks + at[None, :],
                score,
                mask=(block + item_block < q_blocks)[:, None] & (at < k_blocks)[None, :],
            )
        # The next item overwrites the slab.
        tl.debug_barrier()


@triton.jit
def _load_rows(
    pointer, index, d, stride_l, stride_d, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    at = pointer + index.to(tl.int64)[:, None] * stride_l + d.to(tl.int64)[None, :] * stride_d
    if HEAD_DIM == BLOCK_D:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=(d < HEAD_DIM)[None, :], other=0.0)
    return x


@triton.jit
def _block_factors(scale, batch_head, block, blocks):
    """Scale of each block; 1 where the rows are the tokens themselves."""
    if scale is None:
        factors = tl.full(block.shape, 1.0, tl.float32)
    else:
        factors = tl.load(scale + batch_head * blocks + tl.minimum(block, blocks - 1))
    return factors
