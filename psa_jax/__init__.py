"""Pyramid sparse attention for JAX."""

try:
    import flax  # noqa: F401
    import jax  # noqa: F401
except ImportError as error:
    raise ImportError(
        "psa_jax needs JAX and Flax: pip install pyramid-sparse-attention[jax]"
    ) from error

from importlib import import_module
from typing import TYPE_CHECKING

from psa_jax.attention import sparse_attention
from psa_jax.functional import psa_attention
from psa_jax.sdpa import dot_product_attention
from shared_specs.config import PSAConfig

if TYPE_CHECKING:
    from psa_jax.linen import PSAAttention, attention_fn
    from psa_jax.video import PSAVideoAttention, density_records

__all__ = [
    "PSAAttention",
    "PSAConfig",
    "PSAVideoAttention",
    "attention_fn",
    "density_records",
    "dot_product_attention",
    "psa_attention",
    "sparse_attention",
]

_LAZY = {
    "PSAAttention": "psa_jax.linen",
    "PSAVideoAttention": "psa_jax.video",
    "attention_fn": "psa_jax.linen",
    "density_records": "psa_jax.video",
}


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_LAZY[name]), name)
    return value
