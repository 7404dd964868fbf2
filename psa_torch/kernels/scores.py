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

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from psa_torch._triton.launch import launch_kernel, repeated
from psa_torch.kernels._launch import (
    capability,
    cdiv,
    max_inner,
    next_power_of_2,
    on_device_of,
    padded_head_dim,
    require_dtype,
    resident_programs,
)
from psa_torch.kernels.antidiagonal import antidiagonal_scores
from psa_torch.kernels.configs import (
    HOPPER_PEAK,
    HopperScoreConfig,
    ScoreConfig,
    choose_peak,
)
from psa_torch.kernels.pool import pool_blocks
from shared_specs.config import PSAConfig
from shared_specs.sampling import SamplePlan

_LOG2_E = 1.4426950408889634
# Smallest factor on a logit difference: scale 0 must not turn a hidden block's -inf into NaN.
_LEAST_SCALE = 1e-30


@repeated
def block_scores(q: Tensor, k: Tensor, config: PSAConfig) -> Tensor:
    """Scores of every (query block, key block) pair by `config.importance`.

    Args:
        q: `[B, H, Lq, D]`, float16, bfloat16 or float32, any strides.
        k: `[B, Hk, Lk, D]`, same dtype, `H % Hk == 0`.
        config: block sizes, estimator and its parameters, `causal`, `scale`.

    Returns:
        float32 `[B, H, Nq, Nk]`, at least 0; 0 where no row sees a column.

    Raises:
        TypeError: dtype other than the three.
    """
    require_dtype("q", q, (torch.float16, torch.bfloat16, torch.float32))
    require_dtype("k", k, (q.dtype,))
    estimators = {
        "pooled": pooled_scores,
        "sampled": sampled_scores,
        "antidiagonal": antidiagonal_scores,
    }
    return estimators[config.importance](q.detach(), k.detach(), config)


def pooled_scores(q: Tensor, k: Tensor, config: PSAConfig) -> Tensor:
    """Rows and columns are means over groups of `importance_pool` tokens; see `block_scores`."""
    size = config.importance_pool

    def means(x, block, by_place):
        rows, scale = pool_blocks(x, block, size, by_place=by_place)
        return _Samples(rows, x.shape[2], block, size, scale, None, block // size)

    tile = _tile(q, k, config.block_m // size, config)
    rows = means(q, config.block_m, False)
    columns = means(k, config.block_n, isinstance(tile, HopperScoreConfig))
    return _peak_scores(rows, columns, tile, config)


def sampled_scores(q: Tensor, k: Tensor, config: PSAConfig) -> Tensor:
    """Rows and columns are tokens at fixed offsets of each block; see `block_scores`."""
    q_plan, k_plan = config.query_samples, config.key_samples

    def tokens(x, plan):
        offsets = _offsets(plan, x.device)
        return _Samples(x, x.shape[2], plan.block, 1, None, offsets, offsets.shape[0])

    rows, columns = tokens(q, q_plan), tokens(k, k_plan)
    tile = _tile(q, k, rows.count, config)
    if isinstance(tile, HopperScoreConfig):
        rows = rows._replace(values=q.index_select(2, _sampled(q_plan, q.shape[2], q.device)))
        sampled = k.index_select(2, _sampled(k_plan, k.shape[2], k.device, by_place=True))
        columns = columns._replace(values=sampled, count=k_plan.count)
    return _peak_scores(rows, columns, tile, config)


def _repeat_last(plan: SamplePlan) -> Tensor:
    """Sampling offsets, the last one repeated up to a power of two: a repeat changes no maximum."""
    offsets = torch.tensor(plan.offsets.tolist(), dtype=torch.int32)
    missing = next_power_of_2(plan.count) - plan.count
    return torch.cat([offsets, offsets[-1:].expand(missing)])


@functools.lru_cache(maxsize=64)
def _offsets(plan: SamplePlan, device: torch.device) -> Tensor:
    """`_repeat_last` on the device. Kept per device: a copy is made once, not per call."""
    return _repeat_last(plan).to(device)


@functools.lru_cache(maxsize=64)
def _sampled(
    plan: SamplePlan, length: int, device: torch.device, *, by_place: bool = False
) -> Tensor:
    """Sampled tokens on the device: block after block, with as many as `_offsets` has, or the first
    of every block, then the second, ..."""
    starts = torch.arange(0, length, plan.block)
    if by_place:
        at = torch.tensor(plan.offsets.tolist())[:, None] + starts
    else:
        at = starts[:, None] + _repeat_last(plan)
    return at.clamp(max=length - 1).flatten().to(device)


class _Samples(NamedTuple):
    """What stands for the queries, or the keys, of each block.

    Attributes:
        values: `[B, heads, rows, D]`: means (rows are groups) or the tokens themselves. For the
            warp-specialised kernel the rows that count, contiguous: of queries block after block,
            of keys one of every block, then the next of every block.
        length: tokens of the sequence.
        block: tokens per block.
        size: tokens per row.
        scale: float32 `[B, heads, blocks]`, factor on the rows of a block, or None for 1.
        offsets: int32 `[count]`, sampled rows of a block, or None for all.
        count: rows per block that count; of queries a power of two.
    """

    values: Tensor
    length: int
    block: int
    size: int
    scale: Tensor | None
    offsets: Tensor | None
    count: int


def _tile(q: Tensor, k: Tensor, q_count: int, config: PSAConfig) -> ScoreConfig | HopperScoreConfig:
    """Tile sizes for this call: the warp-specialised kernel's where it can run."""
    head_dim, key_blocks = q.shape[-1], cdiv(k.shape[2], config.block_n)
    # On the CPU the interpreter plays an H100, but cannot run the warp-specialised kernel.
    if (
        q.is_cuda
        and capability(q) == (9, 0)
        and fits_hopper(q.dtype, head_dim, q_count, key_blocks)
    ):
        return HOPPER_PEAK[head_dim]
    return choose_peak(capability(q), head_dim, q.dtype, config.causal)


def fits_hopper(dtype: torch.dtype, head_dim: int, q_count: int, key_blocks: int) -> bool:
    """Whether the warp-specialised kernel takes such a call.

    Each half of its rows must be whole query blocks, and with few key blocks most of its columns
    would be empty.
    """
    tile = HOPPER_PEAK.get(head_dim)
    narrow = dtype != torch.float32
    return narrow and tile is not None and q_count <= tile.rows // 2 and key_blocks >= tile.columns


def _peak_scores(
    q: _Samples, k: _Samples, tile: ScoreConfig | HopperScoreConfig, config: PSAConfig
) -> Tensor:
    batch, heads, q_rows, head_dim = q.values.shape
    scale = config.resolved_scale(head_dim)
    nq, nk = cdiv(q.length, q.block), cdiv(k.length, k.block)
    rows = max(tile.rows, q.count)
    # A tensor-core product has at least 16 columns.
    key_blocks = min(tile.columns, max(16, next_power_of_2(nk)))
    row_tiles = cdiv(nq, rows // q.count)
    items = row_tiles * batch * heads
    programs = min(items, resident_programs(q.values, tile.per_processor))
    scores = torch.empty(batch, heads, nq, nk, dtype=torch.float32, device=q.values.device)
    factor = max(abs(scale), _LEAST_SCALE) * _LOG2_E
    group = heads // k.values.shape[1]
    k_rows = cdiv(k.length, k.size)
    sizes = (k_rows, q.length, k.length, nq, nk, row_tiles, items)
    constants = dict(
        BLOCK_M=q.block,
        BLOCK_N=k.block,
        SIZE=q.size,
        Q_COUNT=q.count,
        K_COUNT=k.count,
        CAUSAL=config.causal,
        NEGATIVE=scale < 0,
    )
    with on_device_of(q.values):
        if isinstance(tile, HopperScoreConfig):
            # Triton's interpreter does not know Gluon: nothing else may import it.
            from psa_torch.kernels import scores_hopper

            tiles = cdiv(nk, key_blocks)
            slab = _scratch(q.values, programs, tiles, rows, key_blocks)
            tops = _scratch(q.values, programs, 2, rows)
            scores_hopper.launch(
                q.values,
                k.values,
                (
                    q.scale,
                    k.scale,
                    q.offsets,
                    k.offsets,
                    slab,
                    tops,
                    scores,
                    factor,
                    heads,
                    group,
                    *sizes,
                ),
                programs,
                tile,
                Q_BLOCKS=rows // q.count,
                **constants,
            )
            return scores
        sweep = max(64, key_blocks)
        width = cdiv(nk, sweep) * sweep
        launch_kernel(
            _peak_kernel,
            (programs,),
            q.values,
            k.values,
            q.scale,
            k.scale,
            q.offsets,
            k.offsets,
            _scratch(q.values, programs, rows, width),
            scores,
            *q.values.stride(),
            *k.values.stride(),
            factor,
            heads,
            group,
            q_rows,
            *sizes,
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
    return scores


def _scratch(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.float32, device=x.device)


@triton.jit
def _peak_kernel(
    Q,
    K,
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
    k_stride_b,
    k_stride_h,
    k_stride_l,
    k_stride_d,
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
    CAUSAL: tl.constexpr,
    NEGATIVE: tl.constexpr,
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
    row_in_item = (row // Q_COUNT) * (BLOCK_M // SIZE) + _in_block(Q_OFFSETS, row % Q_COUNT)
    SLAB += tl.program_id(0).to(tl.int64) * ROWS * width
    slab_row = SLAB + row[:, None] * width.to(tl.int64)
    block_tiles = tl.cdiv(k_blocks, K_BLOCKS)

    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        # Under causality the last rows see most: they come first.
        block = (row_tiles - 1 - item % row_tiles) * Q_BLOCKS
        bh = (item // row_tiles).to(tl.int64)
        kv_bh = (bh // heads) * (heads // group_heads) + (bh % heads) // group_heads
        q_head = Q + (bh // heads) * q_stride_b + (bh % heads) * q_stride_h
        k_head = K + (bh // heads) * k_stride_b + ((bh % heads) // group_heads) * k_stride_h
        q_index = tl.minimum(block * (BLOCK_M // SIZE) + row_in_item, q_rows - 1)
        q = _load_rows(q_head, q_index, d, q_stride_l, q_stride_d, HEAD_DIM, BLOCK_D)
        row_max = tl.full([ROWS], float("-inf"), tl.float32)
        row_position = tl.minimum(q_index * SIZE + SIZE, q_len) - 1 + kv_len - q_len

        open_tiles = block_tiles  # tiles of key blocks that every row sees whole
        seen_tiles = block_tiles  # tiles of which some row sees a column
        if CAUSAL:
            first_position = block * BLOCK_M + kv_len - q_len
            last_position = tl.minimum((block + Q_BLOCKS) * BLOCK_M, q_len) - 1 + kv_len - q_len
            tile_keys: tl.constexpr = K_BLOCKS * BLOCK_N
            open_tiles = tl.minimum(tl.maximum(first_position + 1, 0) // tile_keys, block_tiles)
            seen_tiles = tl.minimum(
                tl.cdiv(tl.maximum(last_position + 1, 0), tile_keys), block_tiles
            )
        for MASKED in tl.static_range(2 if CAUSAL else 1):
            first_tile = open_tiles if MASKED else 0
            for tile in range(first_tile, seen_tiles if MASKED else open_tiles):
                key_block = tl.minimum(tile * K_BLOCKS + tile_block, k_blocks - 1)
                peak = tl.full([ROWS, K_BLOCKS], float("-inf"), tl.float32)
                # One column of every key block at a time: the largest product of a block is then
                # a maximum of accumulators, element by element, with no exchange of threads.
                for place in tl.range(0, K_COUNT, num_stages=STAGES):
                    index = key_block * (BLOCK_N // SIZE) + _in_block(K_OFFSETS, place)
                    index = tl.minimum(index, k_rows - 1)
                    k = _load_rows(k_head, index, d, k_stride_l, k_stride_d, HEAD_DIM, BLOCK_D)
                    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                    if NEGATIVE:
                        s = -s
                    if MASKED:
                        s = tl.where(
                            (index * SIZE)[None, :] <= row_position[:, None], s, float("-inf")
                        )
                    peak = tl.maximum(peak, s)
                peak *= _block_factors(K_SCALE, kv_bh, key_block, k_blocks)[None, :]
                row_max = tl.maximum(row_max, tl.max(peak, 1))
                tl.store(slab_row + (tile * K_BLOCKS + tile_block)[None, :], peak)

        # The slab was written by other threads of this program.
        tl.debug_barrier()
        if CAUSAL:  # a row that sees nothing: its -inf minus 0 gives a score of 0
            row_max = tl.where(row_max == float("-inf"), 0.0, row_max)
        row_factor = logit_factor * _block_factors(Q_SCALE, bh, block + row // Q_COUNT, q_blocks)
        seen_blocks = tl.minimum(seen_tiles * K_BLOCKS, k_blocks)
        out = bh * q_blocks + (block + item_block).to(tl.int64)
        for start in range(0, k_blocks, SWEEP):
            at = start + swept
            peak = tl.load(
                slab_row + at[None, :], mask=(at < seen_blocks)[None, :], other=float("-inf")
            )
            below = (peak - row_max[:, None]) * row_factor[:, None]
            score = tl.exp2(max_inner(below, Q_BLOCKS, Q_COUNT, SWEEP))
            tl.store(
                SCORES + out[:, None] * k_blocks + at[None, :],
                score,
                mask=(block + item_block < q_blocks)[:, None] & (at < k_blocks)[None, :],
            )
        # The next item overwrites the slab.
        tl.debug_barrier()


@triton.jit
def _in_block(OFFSETS, sample):
    """Row inside its block of a sample."""
    if OFFSETS is None:
        place = sample
    else:
        place = tl.load(OFFSETS + sample)
    return place


@triton.jit
def _load_rows(X, index, d, stride_l, stride_d, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    at = X + index.to(tl.int64)[:, None] * stride_l + d.to(tl.int64)[None, :] * stride_d
    if HEAD_DIM == BLOCK_D:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=(d < HEAD_DIM)[None, :], other=0.0)
    return x


@triton.jit
def _block_factors(SCALE, bh, block, blocks):
    """Scale of each block; 1 where the rows are the tokens themselves."""
    if SCALE is None:
        factors = tl.full(block.shape, 1.0, tl.float32)
    else:
        factors = tl.load(SCALE + bh * blocks + tl.minimum(block, blocks - 1))
    return factors
