"""How far each key block may be pooled (specification, section 7), in one pass over K.

A program owns one key block and loads token 0, 1, ... of all its groups of eight as eight tiles
of rows; every cosine is then between two tiles. At 75,600 keys, 24 heads, D = 128, bfloat16: 0.46
GB read, nothing to speak of written, 0.10 ms at 4.8 TB/s.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from psa_torch._triton.launch import launch_kernel
from psa_torch.kernels._launch import next_power_of_2, on_device_of, require_dtype
from shared_specs.config import PSAConfig
from shared_specs.geometry import cdiv


def similarity_cap(k: Tensor, config: PSAConfig) -> Tensor:
    """Largest level at which a key block's neighbours are still alike.

    Args:
        k: `[B, Hk, Lk, D]`, any strides; float16, bfloat16 or float32.
        config: `block_n` and the three thresholds.

    Returns:
        int32 `[B, Hk, Nk]` in {1, 2, 4, 8}.

    Raises:
        TypeError: dtype other than the three.
    """
    require_dtype("k", k, (torch.float16, torch.bfloat16, torch.float32))
    k = k.detach()
    batch, heads, kv_len, head_dim = k.shape
    blocks = cdiv(kv_len, config.block_n)
    cap = k.new_empty(batch, heads, blocks, dtype=torch.int32)
    with on_device_of(k):
        launch_kernel(
            _cap_kernel,
            (blocks * batch * heads,),
            k,
            cap,
            *k.stride(),
            heads,
            kv_len,
            blocks,
            *config.similarity_thresholds.values(),
            HEAD_DIM=head_dim,
            BLOCK_D=next_power_of_2(head_dim),
            BLOCK=config.block_n,
            num_warps=4,
        )
    return cap


@triton.jit
def _cap_kernel(
    k_pointer,
    cap_pointer,
    stride_b,
    stride_h,
    stride_l,
    stride_d,
    heads,
    kv_len,
    blocks,
    threshold_2,
    threshold_4,
    threshold_8,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: blocks * batch * heads."""
    pid = tl.program_id(0)
    batch_head = (pid // blocks).to(tl.int64)
    k_pointer += (batch_head // heads) * stride_b + (batch_head % heads) * stride_h
    start = (pid % blocks) * BLOCK
    real = tl.minimum(kv_len - start, BLOCK)
    group = tl.arange(0, BLOCK // 8)
    d = tl.arange(0, BLOCK_D)
    args = (k_pointer, start + group * 8, d, stride_l, stride_d, kv_len)
    x0 = _token(args, 0, HEAD_DIM)
    x7 = _token(args, 7, HEAD_DIM)
    cosine_8 = _cosines(x0, x7, group * 8 + 8 <= real)
    x3 = _token(args, 3, HEAD_DIM)
    cosine_4 = _cosines(x0, x3, group * 8 + 4 <= real)
    cosine_2 = _cosines(x0, _token(args, 1, HEAD_DIM), group * 8 + 2 <= real)
    cosine_2 += _cosines(_token(args, 2, HEAD_DIM), x3, group * 8 + 4 <= real)
    x4 = _token(args, 4, HEAD_DIM)
    cosine_4 += _cosines(x4, x7, group * 8 + 8 <= real)
    cosine_2 += _cosines(x4, _token(args, 5, HEAD_DIM), group * 8 + 6 <= real)
    cosine_2 += _cosines(_token(args, 6, HEAD_DIM), x7, group * 8 + 8 <= real)
    cap = tl.where(_alike(cosine_2, real // 2, threshold_2), 2, 1)
    cap = tl.where(_alike(cosine_4, real // 4, threshold_4), 4, cap)
    cap = tl.where(_alike(cosine_8, real // 8, threshold_8), 8, cap)
    tl.store(cap_pointer + pid, cap)


@triton.jit
def _token(args, one: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Token `one` of every group, float32."""
    k_pointer, first, d, stride_l, stride_d, kv_len = args
    token = first + one
    at = token.to(tl.int64)[:, None] * stride_l + d.to(tl.int64)[None, :] * stride_d
    real = (token < kv_len)[:, None] & (d < HEAD_DIM)[None, :]
    return tl.load(k_pointer + at, mask=real, other=0.0).to(tl.float32)


@triton.jit
def _cosines(x, y, whole):
    """Cosine of each pair of rows, 0 where the group is not whole."""
    norms = tl.sqrt_rn(tl.sum(x * x, 1)) * tl.sqrt_rn(tl.sum(y * y, 1))
    return tl.where(whole, tl.sum(x * y, 1) / tl.maximum(norms, 1e-12), 0.0)


@triton.jit
def _alike(cosines, groups, threshold):
    """Whether the mean over whole groups passes; a block without one does not."""
    return (groups > 0) & (tl.sum(cosines, 0) / tl.maximum(groups, 1).to(tl.float32) > threshold)
