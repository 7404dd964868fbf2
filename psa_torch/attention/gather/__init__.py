"""Attention by gathering the selected pyramid rows: plain torch, any device.

Every query block gathers the pooled keys and values that its levels name and runs one small
dense softmax over them, so the work is that of the visited rows. Query blocks with similar
numbers of rows are padded to one size and multiplied together (`plan`). float16 and bfloat16
inputs are computed in float32, float32 and float64 in their own precision.

Off the CPU the host reads the sizes of those batches back, so `gather` synchronises there.
"""

from torch import Tensor

from psa_torch.attention.gather.backward import backward
from psa_torch.attention.gather.forward import forward
from psa_torch.attention.gather.tangent import tangent
from shared_specs.constants import BLOCK_M, BLOCK_N, MAX_HEAD_DIM

__all__ = ["backward", "forward", "tangent", "unsupported"]

DTYPES = ("float16", "bfloat16", "float32", "float64")


def unsupported(q: Tensor, k: Tensor, v: Tensor, block_m: int, block_n: int) -> str | None:
    """Why `gather` cannot run on this input, or None if it can."""
    dtype = str(q.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        return f"dtype must be one of {', '.join(DTYPES)}, got {dtype}"
    for head_dim in (q.shape[3], v.shape[3]):
        if head_dim % 8 or not 8 <= head_dim <= MAX_HEAD_DIM:
            return f"head dimension must be a multiple of 8 in 8..{MAX_HEAD_DIM}, got {head_dim}"
    if block_m not in BLOCK_M or block_n not in BLOCK_N:
        return (
            f"block_m must be one of {BLOCK_M} and block_n one of {BLOCK_N}, "
            f"got {block_m} and {block_n}"
        )
    return None
