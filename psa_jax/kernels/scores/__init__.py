"""Block scores `pooled` and `sampled` in Pallas on Mosaic GPU, for Hopper: wgmma fed by TMA."""

from jax import Array

from psa_jax._mosaic.channels import HEAD_DIMS
from psa_jax._mosaic.device import device_reason
from psa_jax.kernels.scores.api import peak_scores
from shared_specs.config import PSAConfig

__all__ = ["peak_scores", "unsupported"]

DTYPES = ("float16", "bfloat16")


def unsupported(q: Array, k: Array, config: PSAConfig) -> str | None:
    """Why the kernel cannot run on this input or device, or None."""
    if config.importance not in ("pooled", "sampled"):
        return f"has no {config.importance!r} scores"
    if str(q.dtype) not in DTYPES or q.dtype != k.dtype:
        return f"takes q and k of float16 or of bfloat16, got {q.dtype} and {k.dtype}"
    if q.shape[-1] > max(HEAD_DIMS):
        return f"takes head dimensions up to {max(HEAD_DIMS)}, got {q.shape[-1]}"
    return device_reason(q)
