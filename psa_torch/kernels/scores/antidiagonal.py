"""Block scores `antidiagonal` (specification, section 5).

The sums along the antidiagonals of g x g tiles are one product of `[ceil(Lq / g), g * D]` rows
with `[ceil(Lk / g), g * D]` columns whose tokens are reversed inside each tile. Both are read in
place: step a of a product takes token `a` of each row's tile and token `g - 1 - a` of each
column's. The softmax streams: a program keeps, per row and key block, the logarithm of the block's
sum of exponentials in a slab of float32 scratch, and the row's running maximum and sum in
registers; then it walks its slab once, turns logarithms into shares and sums them per query block.

Counts at 75,600 tokens, 24 heads, D = 128, stride 8 (9,450 rows and columns, 1,024 deep):

    product     4.39 TFLOP, 7.3 ms at 600 TFLOP/s (half of it under causality), so it runs once
    operands    128 x 256 tiles: 768 KB per 67 MFLOP from L2, 51 GB in all, 9 ms at 5.5 TB/s and
                so what bounds the kernel; a tile of 128 x 128 would move 69 GB
    slab        1.1 GB written and read back by the processor that wrote it; 132 programs hold
                80 MB
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from psa_torch._triton.constants import LOG2E
from psa_torch._triton.launch import launch_kernel
from psa_torch.kernels._launch import (
    capability,
    on_device_of,
    padded_head_dim,
    resident_programs,
    sum_inner,
)
from psa_torch.kernels.scores.tiles import choose_antidiagonal
from shared_specs.config import PSAConfig
from shared_specs.geometry import cdiv


class Tokens(NamedTuple):
    """Tokens of one head: pointer to the first, strides of tokens and of channels, how many."""

    pointer: object
    stride_l: object
    stride_d: object
    length: object


def antidiagonal_scores(q: Tensor, k: Tensor, config: PSAConfig) -> Tensor:
    """Softmax over tiles of the sums along their antidiagonals, summed over a block.

    Args:
        q: `[B, H, Lq, D]`, float16, bfloat16 or float32, any strides.
        k: `[B, Hk, Lk, D]`, same dtype, `H % Hk == 0`.
        config: block sizes, `antidiagonal_stride`, `causal`, `scale`.

    Returns:
        float32 `[B, H, Nq, Nk]`, at least 0.
    """
    batch, heads, q_len, head_dim = q.shape
    kv_len, size = k.shape[2], config.antidiagonal_stride
    scale = config.resolved_scale(head_dim)
    q_blocks, k_blocks = cdiv(q_len, config.block_m), cdiv(kv_len, config.block_n)
    scores = torch.empty(batch, heads, q_blocks, k_blocks, dtype=torch.float32, device=q.device)
    tile = choose_antidiagonal(capability(q), q.dtype)
    q_count, k_count = config.block_m // size, config.block_n // size
    rows, columns = max(tile.rows, q_count), max(tile.columns, k_count)
    row_tiles = cdiv(q_blocks, rows // q_count)
    items = row_tiles * batch * heads
    programs = min(items, resident_programs(q, tile.per_processor))
    sweep = max(64, columns // k_count)
    width = cdiv(k_blocks, sweep) * sweep
    slab = torch.empty(programs, rows, width, dtype=torch.float32, device=q.device)
    block_d = padded_head_dim(head_dim)
    with on_device_of(q):
        launch_kernel(
            _antidiagonal_kernel,
            (programs,),
            q,
            k,
            slab,
            scores,
            *q.stride(),
            *k.stride(),
            scale * LOG2E.value,
            heads,
            heads // k.shape[1],
            q_len,
            kv_len,
            q_blocks,
            k_blocks,
            row_tiles,
            items,
            width,
            HEAD_DIM=head_dim,
            BLOCK_D=block_d,
            DEPTH=min(block_d, 32 if q.dtype == torch.float32 else 64),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            STRIDE=size,
            ROWS=rows,
            COLUMNS=columns,
            SWEEP=sweep,
            IS_CAUSAL=config.causal,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            STAGES=tile.stages,
            num_warps=tile.warps,
        )
    return scores


@triton.jit
def _antidiagonal_kernel(
    q_pointer,
    k_pointer,
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
    q_len,
    kv_len,
    q_blocks,
    k_blocks,
    row_tiles,
    items,
    width,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SWEEP: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid: any number of programs; item = (batch * heads, run of ROWS rows)."""
    Q_COUNT: tl.constexpr = BLOCK_M // STRIDE
    K_COUNT: tl.constexpr = BLOCK_N // STRIDE
    Q_BLOCKS: tl.constexpr = ROWS // Q_COUNT
    K_BLOCKS: tl.constexpr = COLUMNS // K_COUNT
    row_in_item = tl.arange(0, ROWS)
    column_in_tile = tl.arange(0, COLUMNS)
    tile_block = tl.arange(0, K_BLOCKS)
    swept = tl.arange(0, SWEEP)
    item_block = tl.arange(0, Q_BLOCKS)
    slab += tl.program_id(0).to(tl.int64) * ROWS * width
    slab_row = slab + row_in_item[:, None] * width.to(tl.int64)
    column_tiles = tl.cdiv(k_blocks, K_BLOCKS)
    columns = tl.cdiv(kv_len, STRIDE)

    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        # Under causality the last rows see most: they come first.
        block = (row_tiles - 1 - item % row_tiles) * Q_BLOCKS
        batch_head = (item // row_tiles).to(tl.int64)
        q_head = q_pointer + (batch_head // heads) * q_stride_b + (batch_head % heads) * q_stride_h
        k_head = (
            k_pointer
            + (batch_head // heads) * k_stride_b
            + ((batch_head % heads) // group) * k_stride_h
        )
        row = block * Q_COUNT + row_in_item
        row_position = tl.minimum(row * STRIDE + STRIDE, q_len) - 1 + kv_len - q_len
        row_max = tl.full([ROWS], float("-inf"), tl.float32)
        row_sum = tl.zeros([ROWS], tl.float32)
        seen_tiles = column_tiles
        if IS_CAUSAL:
            last_position = tl.minimum((block + Q_BLOCKS) * BLOCK_M, q_len) - 1 + kv_len - q_len
            seen_tiles = tl.minimum(
                tl.cdiv(tl.maximum(last_position + 1, 0), K_BLOCKS * BLOCK_N), column_tiles
            )
        for tile in range(0, seen_tiles):
            column = tile * COLUMNS + column_in_tile
            s = _antidiagonal_sums(
                Tokens(q_head, q_stride_l, q_stride_d, q_len),
                Tokens(k_head, k_stride_l, k_stride_d, kv_len),
                row,
                column,
                HEAD_DIM,
                BLOCK_D,
                DEPTH,
                STRIDE,
                PRECISION,
                STAGES,
            )
            # One compare covers both ends: columns past the last tile lie behind every limit.
            limit = tl.full([ROWS], 0, tl.int32) + (columns - 1) * STRIDE
            if IS_CAUSAL:
                limit = tl.minimum(limit, row_position)
            visible = (column * STRIDE)[None, :] <= limit[:, None]
            s = tl.where(visible, s * logit_factor, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(s, 1))
            base = tl.where(new_max == float("-inf"), 0.0, new_max)
            p = tl.exp2(s - base[:, None])
            if K_COUNT == 1:
                block_sum = p
            else:
                block_sum = tl.sum(tl.reshape(p, (ROWS, K_BLOCKS, K_COUNT)), 2)
            row_sum = row_sum * tl.exp2(row_max - base) + tl.sum(p, 1)
            row_max = new_max
            tl.store(
                slab_row + (tile * K_BLOCKS + tile_block)[None, :],
                base[:, None] + tl.log2(block_sum),
            )

        # The slab was written by other threads of this program.
        tl.debug_barrier()
        # Rows that see nothing hold -inf everywhere; rows past the end must add nothing.
        total = tl.where(row_sum > 0, row_max + tl.log2(row_sum), 0.0)
        total = tl.where(row * STRIDE < q_len, total, float("inf"))
        seen_blocks = tl.minimum(seen_tiles * K_BLOCKS, k_blocks)
        out = batch_head * q_blocks + (block + item_block).to(tl.int64)
        for start in range(0, k_blocks, SWEEP):
            at = start + swept
            part = tl.load(
                slab_row + at[None, :], mask=(at < seen_blocks)[None, :], other=float("-inf")
            )
            share = tl.exp2(part - total[:, None])
            tl.store(
                scores + out[:, None] * k_blocks + at[None, :],
                sum_inner(share, Q_BLOCKS, Q_COUNT, SWEEP),
                mask=(block + item_block < q_blocks)[:, None] & (at < k_blocks)[None, :],
            )
        # The next item overwrites the slab.
        tl.debug_barrier()


@triton.jit
def _antidiagonal_sums(
    queries,
    keys,
    row,
    column,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DEPTH: tl.constexpr,
    STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sum over a of q[row * STRIDE + a] . k[column * STRIDE + STRIDE - 1 - a]."""
    CHUNKS: tl.constexpr = BLOCK_D // DEPTH
    s = tl.zeros((row.shape[0], column.shape[0]), tl.float32)
    for step in tl.range(0, STRIDE * CHUNKS, num_stages=STAGES):
        a = step // CHUNKS
        d = (step % CHUNKS) * DEPTH + tl.arange(0, DEPTH)
        q_at = row * STRIDE + a
        k_at = column * STRIDE + (STRIDE - 1 - a)
        q = _load_tokens(queries, q_at, d, HEAD_DIM)
        k = _load_tokens(keys, k_at, d, HEAD_DIM)
        s = tl.dot(q, tl.trans(k), acc=s, input_precision=PRECISION)
    return s


@triton.jit
def _load_tokens(tokens, at, d, HEAD_DIM: tl.constexpr):
    """Channels `d` of the tokens at `at`, zero past the last of either."""
    real = (at < tokens.length)[:, None] & (d < HEAD_DIM)[None, :]
    rows = tokens.pointer + at.to(tl.int64)[:, None] * tokens.stride_l
    return tl.load(rows + d.to(tl.int64)[None, :] * tokens.stride_d, mask=real, other=0.0)
