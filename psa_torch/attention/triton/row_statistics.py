"""What both gradient kernels subtract from every row: delta, and the log of the row's sum."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from psa_torch._triton.constants import LOG2E
from psa_torch._triton.launch import launch_kernel
from psa_torch.attention.triton.columns import in_columns
from psa_torch.kernels._launch import next_power_of_2
from shared_specs.geometry import cdiv


class RowStatistics(NamedTuple):
    """float32 `[B, H, Nq * block_m]` each: `rowsum(dout * out) - dlse`, and lse in base 2."""

    delta: Tensor
    lse2: Tensor


@triton.jit
def row_statistics(
    out_pointer,
    dout_pointer,
    lse_pointer,
    dlse_pointer,
    delta_pointer,
    lse2_pointer,
    out_stride_b,
    out_stride_h,
    out_stride_m,
    dout_stride_b,
    dout_stride_h,
    dout_stride_m,
    heads,
    q_len,
    padded_q_len,
    DV: tl.constexpr,
    V_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_DLSE: tl.constexpr,
):
    """delta = rowsum(dout * out) - dlse, and lse in base 2: what both gradient kernels subtract.

    Rows that see nothing or do not exist get lse2 = +inf, so that their weights are exactly 0.
    """
    batch_head = tl.program_id(1)
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, V_WIDTH)[None, :]
    real = m < q_len
    m64 = m.to(tl.int64)[:, None]
    out_pointer += batch * out_stride_b + head * out_stride_h
    dout_pointer += batch * dout_stride_b + head * dout_stride_h
    here = in_columns(real[:, None], e, DV, V_WIDTH)
    out = tl.load(out_pointer + m64 * out_stride_m + e, mask=here, other=0.0)
    dout = tl.load(dout_pointer + m64 * dout_stride_m + e, mask=here, other=0.0)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    row = batch_head.to(tl.int64) * q_len + m
    lse = tl.load(lse_pointer + row, mask=real, other=float("-inf"))
    seen = lse != float("-inf")
    if HAS_DLSE:
        delta -= tl.load(dlse_pointer + row, mask=real, other=0.0)
    padded_row = batch_head.to(tl.int64) * padded_q_len + m
    inside = m < padded_q_len
    tl.store(delta_pointer + padded_row, tl.where(seen, delta, 0.0), mask=inside)
    tl.store(lse2_pointer + padded_row, tl.where(seen, lse * LOG2E, float("inf")), mask=inside)


def launch_row_statistics(
    out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor | None, block_m: int
) -> RowStatistics:
    """The statistics of `out`, `dout` `[B, H, Lq, Dv]`, `lse`, `dlse` `[B, H, Lq]`."""
    batch, heads, q_len, value_dim = out.shape
    rows = cdiv(q_len, block_m) * block_m
    delta = lse.new_empty(batch, heads, rows, dtype=torch.float32)
    lse2 = torch.empty_like(delta)
    step = 32
    launch_kernel(
        row_statistics,
        (rows // step, batch * heads),
        out,
        dout,
        lse.contiguous(),
        None if dlse is None else dlse.contiguous(),
        delta,
        lse2,
        *out.stride()[:3],
        *dout.stride()[:3],
        heads,
        q_len,
        rows,
        DV=value_dim,
        V_WIDTH=max(16, next_power_of_2(value_dim)),
        ROWS=step,
        HAS_DLSE=dlse is not None,
        num_warps=4,
    )
    return RowStatistics(delta, lse2)
