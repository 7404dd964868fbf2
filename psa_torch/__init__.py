"""Pyramid sparse attention for PyTorch."""

try:
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        "psa_torch needs PyTorch: pip install pyramid-sparse-attention[torch]"
    ) from error

from psa_torch.attention import sparse_attention
from psa_torch.functional import psa_attention
from psa_torch.module import PSAAttention
from psa_torch.sdpa import scaled_dot_product_attention
from psa_torch.video import PSAVideoAttention, VideoState
from shared_specs.config import PSAConfig

__all__ = [
    "PSAAttention",
    "PSAConfig",
    "PSAVideoAttention",
    "VideoState",
    "psa_attention",
    "scaled_dot_product_attention",
    "sparse_attention",
]
