"""Pyramid sparse attention for PyTorch."""

try:
    import torch  # noqa: F401
except ImportError as error:
    raise ImportError(
        "psa_torch needs PyTorch: pip install pyramid-sparse-attention[torch]"
    ) from error

from importlib import import_module
from typing import TYPE_CHECKING

from psa_torch.attention import sparse_attention
from shared_specs.config import PSAConfig

if TYPE_CHECKING:
    from psa_torch.functional import psa_attention
    from psa_torch.module import PSAAttention

__all__ = ["PSAAttention", "PSAConfig", "psa_attention", "sparse_attention"]

_LAZY = {"psa_attention": "psa_torch.functional", "PSAAttention": "psa_torch.module"}


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_LAZY[name]), name)
    return value
