"""How rows of a tensor get into shared memory by tensor copies, in the kernels for Hopper."""

import functools

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


def row_boxes(x: Tensor, rows: int, width: int) -> TensorDescriptor:
    """Copies of `rows` adjacent rows of `[B, heads, rows, D]`, contiguous, all heads end to end.

    width: columns of a box, D or more; those that the rows do not have arrive as zeros.
    """
    layout = _layout(rows, width, x.dtype)
    return TensorDescriptor.from_tensor(x.view(-1, x.shape[-1]), [rows, width], layout)


# Kept: made anew for the six descriptors of a whole call they took 37 us of its host time.
@functools.cache
def _layout(rows: int, width: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    element = getattr(gl, str(dtype).removeprefix("torch."))
    return gl.NVMMASharedLayout.get_default_for([rows, width], element)
