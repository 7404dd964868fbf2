"""Level mask to the packed list that attention kernels walk (specification, section 3).

One program holds one row of the mask; a running count per level gives each block its place. Bytes
at 591 x 1,182 blocks, 24 heads: 67 MB read and 67 MB written, 0.03 ms at 4.8 TB/s. The transposed
table reads the same mask by columns, 32 bytes moved for 4 used, but a head's mask (2.8 MB) stays
in L2 while its columns are read, so this costs no more memory traffic and no transposed copy.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from psa_torch._triton.launch import launch_kernel
from psa_torch.kernels._launch import next_power_of_2, on_device_of


def build_table(levels: Tensor, transposed: bool = False) -> tuple[Tensor, Tensor]:
    """Entries and counts of a level mask.

    Args:
        levels: integer `[B, H, Nq, Nk]`, any strides; values other than 1, 2, 4, 8 mean skip.
        transposed: list the query blocks of each key block instead.

    Returns:
        (entries, counts), contiguous int32 `[B, H, Nq, Nk]` and `[B, H, Nq, 4]` (`[B, H, Nk, Nq]`
        and `[B, H, Nk, 4]` if transposed): ids grouped by level 1, 2, 4, 8, ascending inside a
        level, -1 in unused places.
    """
    entries, counts, _ = _launch(levels, transposed, None)
    return entries, counts


def build_plan(
    levels: Tensor,
    *,
    q_len: int,
    kv_len: int,
    block_m: int,
    block_n: int,
    is_causal: bool,
    transposed: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Entries, counts, and how many of each level's entries need no per-element mask.

    Args:
        levels: integer `[B, H, Nq, Nk]`, any strides.
        q_len, kv_len: tokens.
        block_m, block_n: queries and keys per block.
        is_causal: leave out blocks of which no key is visible.
        transposed: list the query blocks of each key block instead.

    Returns:
        (entries, counts, full). `full` int32, shaped as `counts`: entries of the level for which
        every row of the query block sees the whole key block. Not transposed, the key block must
        also be whole, not cut by the end of the sequence; these are the leading entries of the
        level. Transposed, they are its trailing entries.
    """
    return _launch(levels, transposed, (q_len, kv_len, block_m, block_n, is_causal))


def _launch(levels: Tensor, transposed: bool, geometry: tuple | None):
    batch, heads, rows, columns = levels.shape
    row_stride, column_stride = levels.stride()[2:]
    if transposed:
        rows, columns, row_stride, column_stride = columns, rows, column_stride, row_stride
    entries = levels.new_empty(batch, heads, rows, columns, dtype=torch.int32)
    counts = levels.new_empty(batch, heads, rows, 4, dtype=torch.int32)
    full = None if geometry is None else torch.empty_like(counts)
    q_len, kv_len, block_m, block_n, causal = geometry or (0, 0, 1, 1, False)
    if columns == 0:
        return entries, counts.zero_(), full if full is None else full.zero_()
    width = next_power_of_2(columns)
    with on_device_of(levels):
        launch_kernel(
            _table_kernel,
            (batch * heads * rows,),
            levels,
            entries,
            counts,
            full,
            levels.stride(0),
            levels.stride(1),
            row_stride,
            column_stride,
            heads,
            rows,
            columns,
            q_len,
            kv_len,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            IS_CAUSAL=causal,
            TRANSPOSED=transposed,
            WIDTH=width,
            num_warps=warps_for_row(width),
        )
    return entries, counts, full


def warps_for_row(width: int) -> int:
    """Warps that hold one row of `width` blocks, 16 a lane: twice that spills."""
    return max(1, min(16, width // 512))


@triton.jit
def _table_kernel(
    levels,
    entries,
    counts,
    full,
    stride_b,
    stride_h,
    stride_row,
    stride_column,
    heads,
    rows,
    columns,
    q_len,
    kv_len,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Grid: batch * heads * rows."""
    pid = tl.program_id(0)
    row = pid % rows
    batch_head = (pid // rows).to(tl.int64)
    column = tl.arange(0, WIDTH)
    levels += (
        (batch_head // heads) * stride_b
        + (batch_head % heads) * stride_h
        + row.to(tl.int64) * stride_row
    )
    level = tl.load(
        levels + column.to(tl.int64) * stride_column, mask=column < columns, other=0
    ).to(tl.int32)
    whole = column >= 0
    if full is not None:
        query_block = column if TRANSPOSED else row
        key_block = row if TRANSPOSED else column
        whole, level = plan_of_blocks(
            level, query_block, key_block, q_len, kv_len, BLOCK_M, BLOCK_N, IS_CAUSAL, TRANSPOSED
        )
    store_table_row(level, whole, column, columns, pid, entries, counts, full)


@triton.jit
def plan_of_blocks(
    level,
    query_block,
    key_block,
    q_len,
    kv_len,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Which blocks need no per-element mask; and the levels, 0 where causality hides the block."""
    first_key = key_block * BLOCK_N
    last_key = tl.minimum(first_key + BLOCK_N, kv_len) - 1
    if TRANSPOSED:
        whole = (query_block >= 0) & (key_block >= 0)
    else:
        whole = (query_block >= 0) & (first_key + BLOCK_N <= kv_len)
    if IS_CAUSAL:
        offset = kv_len - q_len
        last_row = tl.minimum((query_block + 1) * BLOCK_M, q_len) - 1
        whole &= last_key <= query_block * BLOCK_M + offset
        level = tl.where(first_key <= last_row + offset, level, 0)
    return whole, level


@triton.jit
def store_table_row(level, whole, column, columns, row, entries, counts, full):
    """Entries, counts and, if full is given, the number of `whole` entries of one row.

    Args:
        level: int32 `[WIDTH]`, 0 past `columns`.
        whole: bool `[WIDTH]`.
        column: `arange(WIDTH)`.
        row: flat row of the output.
    """
    row = row.to(tl.int64)
    entries += row * columns
    used = 0
    for place in tl.static_range(4):
        chosen = level == (1 << place)
        chosen_int = chosen.to(tl.int32)
        at = used + tl.cumsum(chosen_int, 0) - chosen_int
        tl.store(entries + at, column, mask=chosen)
        count = tl.sum(chosen_int, 0)
        tl.store(counts + row * 4 + place, count)
        if full is not None:
            tl.store(full + row * 4 + place, tl.sum((chosen & whole).to(tl.int32), 0))
        used += count
    tl.store(
        entries + column,
        tl.full(column.shape, -1, tl.int32),
        mask=(column >= used) & (column < columns),
    )
