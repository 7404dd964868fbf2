"""The walk of the warp-specialised dk/dv: query blocks that see any key block of a unit.

A unit is `UNIT_ROWS` adjacent pyramid rows of one level, so one key block, several, or a part of
one. Two key blocks side by side are mostly seen by the same query blocks, which are then read once
for both.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from psa_torch._triton.launch import launch_kernel
from psa_torch.kernels._launch import next_power_of_2, on_device_of
from psa_torch.kernels.table import plan_of_blocks, warps_for_row
from shared_specs.geometry import Geometry, cdiv

UNIT_ROWS = 128
"""Pyramid rows of a unit, half of them for each warpgroup that multiplies."""

LEAST_RUN = 16
"""Rows of a key block at the level: the blocks of a unit have eight bits."""

MASKED = tl.constexpr(1 << 8)
"""Bit of an entry that says that causality hides a part; those below name the key blocks."""

LOG_ENTRY = tl.constexpr(9)
"""log2 of what separates the query block of an entry from its bits."""


class Units(NamedTuple):
    """Attributes:
    entries: int32 `[B, H, units, Nq]`, `query block << LOG_ENTRY | bits`, ascending. Bit r says
        that key block r of the unit is seen at the level.
    counts: int32 `[B, H, units]`.
    """

    entries: Tensor
    counts: Tensor


def build_units(levels: Tensor, geometry: Geometry, *, g: int) -> Units:
    """The units of level `2**g`.

    Args:
        levels: int32 `[B, H, Nq, Nk]`, any strides.
        geometry: whose blocks have at least `LEAST_RUN` rows at the level. Under causality query
            blocks are left out of which no key is visible.
    """
    batch, heads, q_blocks, k_blocks = levels.shape
    run = geometry.block_n >> g
    units = cdiv(k_blocks * run, UNIT_ROWS)
    entries = levels.new_empty(batch, heads, units, q_blocks, dtype=torch.int32)
    counts = levels.new_empty(batch, heads, units, dtype=torch.int32)
    width = next_power_of_2(q_blocks)
    with on_device_of(levels):
        launch_kernel(
            _units_kernel,
            (batch * heads * units,),
            levels,
            entries,
            counts,
            *levels.stride(),
            heads,
            units,
            q_blocks,
            k_blocks,
            geometry.q_len,
            geometry.kv_len,
            LEVEL=1 << g,
            BLOCKS=max(1, UNIT_ROWS // run),
            BLOCK_M=geometry.block_m,
            BLOCK_N=geometry.block_n,
            IS_CAUSAL=geometry.is_causal,
            WIDTH=width,
            num_warps=warps_for_row(width),
        )
    return Units(entries, counts)


@triton.jit
def _units_kernel(
    levels,
    entries,
    counts,
    stride_b,
    stride_h,
    stride_m,
    stride_n,
    heads,
    units,
    q_blocks,
    k_blocks,
    q_len,
    kv_len,
    LEVEL: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Grid: batch * heads * units."""
    pid = tl.program_id(0)
    batch_head = (pid // units).to(tl.int64)
    unit = pid % units
    query_block = tl.arange(0, WIDTH)
    levels += (batch_head // heads) * stride_b + (batch_head % heads) * stride_h
    levels += query_block.to(tl.int64) * stride_m
    bits = tl.zeros([WIDTH], tl.int32)
    masked = bits
    for r in tl.static_range(BLOCKS):
        # The last unit may have fewer key blocks.
        key_block = unit * BLOCKS + r
        there = query_block < tl.where(key_block < k_blocks, q_blocks, 0)
        level = tl.load(levels + key_block.to(tl.int64) * stride_n, mask=there, other=0)
        whole, level = plan_of_blocks(
            level.to(tl.int32),
            query_block,
            key_block,
            q_len,
            kv_len,
            BLOCK_M,
            BLOCK_N,
            IS_CAUSAL,
            True,
        )
        here = level == LEVEL
        bits |= here.to(tl.int32) << r
        masked |= (here & ~whole).to(tl.int32)
    listed = (bits > 0).to(tl.int32)
    at = pid.to(tl.int64) * q_blocks + tl.cumsum(listed, 0) - listed
    entry = (query_block << LOG_ENTRY) | (masked * MASKED) | bits
    tl.store(entries + at, entry, mask=bits > 0)
    tl.store(counts + pid, tl.sum(listed, 0))
