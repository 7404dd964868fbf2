"""Pyramid sparse attention in Pallas on Mosaic GPU, for Hopper: wgmma fed by TMA.

Kernels: `forward_kernel`, `query_gradient` (dq), `key_gradient` (dk and dv of the finer levels),
and the two of `coarse_gradient` (dk and dv of the coarse ones). Each walks what `query_plan`,
`key_plan` or `coarse_plan` makes from the level mask on the device.
"""

from jax import Array

from psa_jax._mosaic.channels import HEAD_DIMS
from psa_jax._mosaic.device import device_reason, interpreted
from psa_jax.attention.mosaic.api import backward, forward
from shared_specs.constants import BLOCK_M, BLOCK_N

__all__ = ["backward", "forward", "interpreted", "unsupported"]

DTYPES = ("float16", "bfloat16")


def unsupported(q: Array, k: Array, v: Array, block_m: int, block_n: int) -> str | None:
    """Why these kernels cannot run on this input or device, or None."""
    if str(q.dtype) == "float32":
        return "takes float16 and bfloat16: wgmma has no true float32 product"
    if str(q.dtype) not in DTYPES:
        return f"takes float16 and bfloat16, got {q.dtype}"
    if q.shape[-1] > max(HEAD_DIMS):
        return f"takes head dimensions up to {max(HEAD_DIMS)}, got {q.shape[-1]}"
    if v.shape[-1] != q.shape[-1]:
        return f"takes values of the head dimension of keys, {q.shape[-1]}, got {v.shape[-1]}"
    if block_m not in BLOCK_M or block_n not in BLOCK_N:
        return f"takes block_m of {BLOCK_M} and block_n of {BLOCK_N}, got {block_m} and {block_n}"
    return device_reason(q)
