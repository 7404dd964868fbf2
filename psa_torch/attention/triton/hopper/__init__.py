"""Warp-specialised attention kernels for Hopper, in Gluon.

Gluon cannot be interpreted, so nothing imports the modules of this folder before they are needed,
but `units`, whose kernel is a plain one.
"""

import torch

CAPABILITY = (9, 0)
HEAD_DIMS = (64, 128)
"""Columns of the kernels; what lies between takes the next, its missing columns read as zeros."""

LEAST_HEAD_DIM = 40
"""Below, the narrower kernel of every GPU multiplies half as much."""
DTYPES = (torch.float16, torch.bfloat16)
BLOCK_M = 128


def unsupported(
    head_dim: int,
    dtype: torch.dtype,
    block_m: int,
    capability: tuple[int, int],
    *,
    rows: int = BLOCK_M,
) -> str | None:
    """Why there is no warp-specialised kernel for such a call, or None if there is.

    Args:
        capability: compute capability of the GPU.
        rows: queries that a kernel takes at once, of which `block_m` must be a multiple.
    """
    if head_dim % 8 or not LEAST_HEAD_DIM <= head_dim <= HEAD_DIMS[-1]:
        accepted = f"a multiple of 8 in {LEAST_HEAD_DIM}..{HEAD_DIMS[-1]}"
        return f"head dimension must be {accepted}, got {head_dim}"
    if dtype not in DTYPES:
        names = " or ".join(str(accepted).removeprefix("torch.") for accepted in DTYPES)
        return f"dtype must be {names}, got {str(dtype).removeprefix('torch.')}"
    if block_m > BLOCK_M or block_m % rows:
        return f"block_m must be a multiple of {rows} and at most {BLOCK_M}, got {block_m}"
    if capability != CAPABILITY:
        return f"compute capability must be 9.0, this GPU has {'.'.join(map(str, capability))}"
    return None


def require_supported(config: object, *call, **sizes) -> None:
    """Raise ValueError, with the name of `config`, for a call that `unsupported` refuses."""
    if reason := unsupported(*call, **sizes):
        raise ValueError(f"{type(config).__name__} cannot be used here: {reason}")
