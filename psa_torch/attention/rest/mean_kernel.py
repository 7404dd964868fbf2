"""Means of the keys and values of every block as one Triton kernel, and how rows are read."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from psa_torch._triton.launch import launch_kernel
from psa_torch.kernels._launch import on_device_of, padded_head_dim
from shared_specs.geometry import cdiv


def dense_rows(x: Tensor) -> Tensor:
    """`x` itself if its last dimension is dense, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit
def places(pointer, first, end, stride, WIDTH: tl.constexpr, D: tl.constexpr, N: tl.constexpr):
    """Where rows `first … first + N - 1` are, `[N, WIDTH]`, and which of them are real.

    64-bit offsets for the first row only: those of all numbers would fill the registers.
    """
    m = tl.arange(0, N)
    d = tl.arange(0, WIDTH)
    at = pointer + tl.cast(first, tl.int64) * stride + (m[:, None] * stride + d[None, :])
    return at, (m < end - first)[:, None] & (d < D)[None, :]


@triton.jit
def load_rows(pointer, first, end, stride, WIDTH: tl.constexpr, D: tl.constexpr, N: tl.constexpr):
    """`[N, WIDTH]` from row `first` on, zero from row `end` and column `D` on."""
    at, real = places(pointer, first, end, stride, WIDTH, D, N)
    return tl.load(at, mask=real, other=0.0)


@triton.jit
def mean_of_block(
    k_pointer,
    v_pointer,
    k_means,
    v_means,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    heads,
    kv_len,
    blocks,
    D: tl.constexpr,
    DV: tl.constexpr,
    WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Mean of the keys of one block, or along axis 1 of its values."""
    pid = tl.program_id(0)
    batch_head = (pid // blocks).to(tl.int64)
    first = (pid % blocks) * BLOCK_N
    batch, head = batch_head // heads, batch_head % heads
    if tl.program_id(1) == 0:
        rows = k_pointer + batch * k_stride_b + head * k_stride_h
        x = load_rows(rows, first, kv_len, k_stride_n, WIDTH, D, BLOCK_N)
        _store_mean(k_means, x, pid, kv_len - first, D, WIDTH, BLOCK_N)
    else:
        rows = v_pointer + batch * v_stride_b + head * v_stride_h
        x = load_rows(rows, first, kv_len, v_stride_n, V_WIDTH, DV, BLOCK_N)
        _store_mean(v_means, x, pid, kv_len - first, DV, V_WIDTH, BLOCK_N)


@triton.jit
def _store_mean(means, x, row, left, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr):
    """Row `row` of `means`: the mean of the rows of x, of which at most `left` are real."""
    count = tl.minimum(left, BLOCK_N).to(tl.float32)
    d = tl.arange(0, WIDTH)
    mean = (tl.sum(x.to(tl.float32), 0) / count).to(x.dtype)
    tl.store(means + row.to(tl.int64) * D + d, mean, mask=d < D)


@torch.no_grad()
def means_of_blocks(k: Tensor, v: Tensor, block_n: int) -> tuple[Tensor, Tensor]:
    """As `psa_torch.attention.rest.plain.means_of_blocks`; float16, bfloat16 or float32."""
    k, v = dense_rows(k), dense_rows(v)
    (batch, heads, kv_len, head_dim), value_dim = k.shape, v.shape[3]
    blocks = cdiv(kv_len, block_n)
    means = tuple(x.new_empty(batch, heads, blocks, x.shape[3]) for x in (k, v))
    with on_device_of(k):
        launch_kernel(
            mean_of_block,
            (blocks * batch * heads, 2),
            k,
            v,
            *means,
            *k.stride()[:3],
            *v.stride()[:3],
            heads,
            kv_len,
            blocks,
            D=head_dim,
            DV=value_dim,
            WIDTH=padded_head_dim(head_dim),
            V_WIDTH=padded_head_dim(value_dim),
            BLOCK_N=block_n,
            num_warps=4,
        )
    return means
