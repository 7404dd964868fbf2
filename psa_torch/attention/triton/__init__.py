"""Attention as Triton kernels that walk the table of visited blocks.

The forward and dq walk the key blocks of each query block; dk and dv of fine levels the query
blocks of each key block; dk and dv of coarse levels one after the other. A tile holds pooled
rows of one level, so the log of its count is one number; full tiles run without any mask, and
what is left over goes through a masked tail.
"""

import os

# Products and sums fuse in every kernel here; later Triton releases ask for this to be said.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from torch import Tensor

from psa_torch.attention.triton.backward_pass import backward
from psa_torch.attention.triton.configs import DTYPES, head_dims
from psa_torch.attention.triton.forward_pass import attention_forward, forward
from psa_torch.kernels._launch import capability
from shared_specs.constants import BLOCK_M, BLOCK_N
from shared_specs.pyramid import pyramid_rows

__all__ = ["backward", "forward", "unsupported"]

MIN_CAPABILITY = (8, 0)
MAX_PROGRAMS = 65_535
"""Most programs along the second axis of a CUDA grid."""


def unsupported(q: Tensor, k: Tensor, v: Tensor, block_m: int, block_n: int) -> str | None:
    """Why these kernels cannot run on this input, or None if they can.

    Args:
        q: `[B, H, Lq, D]`; k: `[B, Hk, Lk, D]`; v: `[B, Hk, Lk, Dv]`.
        block_m, block_n: queries and keys per block.
    """
    return _unsupported_device(q) or _unsupported_shape(q, k, v, block_m, block_n)


def _unsupported_device(q: Tensor) -> str | None:
    if not q.is_cuda:
        if isinstance(attention_forward, triton.JITFunction):
            return (
                f"Triton kernels need a CUDA device, q is on {q.device.type} "
                "(TRITON_INTERPRET=1, set before the first import, runs them on the CPU for tests)"
            )
        return None
    if torch.version.hip is not None:
        return "the Triton kernels are written for NVIDIA GPUs, this is a ROCm build of torch"
    if capability(q) < MIN_CAPABILITY:
        found = ".".join(map(str, capability(q)))
        return f"compute capability must be at least 8.0, this GPU has {found}"
    return None


def _unsupported_shape(q: Tensor, k: Tensor, v: Tensor, block_m: int, block_n: int) -> str | None:
    batch, heads = q.shape[:2]
    if q.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        return f"dtype must be one of {names}, got {str(q.dtype).removeprefix('torch.')}"
    most = head_dims(capability(q))[-1]
    for head_dim in (q.shape[3], v.shape[3]):
        if head_dim % 8 or not 8 <= head_dim <= most:
            return f"head dimension must be a multiple of 8 in 8..{most}, got {head_dim}"
    if block_m not in BLOCK_M or block_n not in BLOCK_N:
        return (
            f"block_m must be one of {BLOCK_M} and block_n one of {BLOCK_N}, "
            f"got {block_m} and {block_n}"
        )
    if batch * heads > MAX_PROGRAMS:
        return f"batch times heads must be at most {MAX_PROGRAMS}, got {batch * heads}"
    # Offsets inside one head are 32-bit, those of heads and batches 64-bit.
    elements = pyramid_rows(k.shape[2], block_n) * max(q.shape[3], v.shape[3])
    if elements >= 2**31:
        return f"the pyramid of one head must hold fewer than 2**31 numbers, got {elements}"
    return None
