"""How far each key block may be pooled (specification, section 7)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from psa_jax._switches import numpy_rules
from psa_jax.pyramid import split_tokens
from shared_specs.config import PSAConfig
from shared_specs.geometry import cdiv

MIN_NORM_PRODUCT = np.float32(1e-12)


@numpy_rules
def similarity_cap(k: Array, config: PSAConfig) -> Array:
    """Largest level at which a key block's neighbours are still alike.

    Args:
        k: `[B, Hk, Lk, D]`.
        config: `block_n` and the three thresholds.

    Returns:
        int32 `[B, Hk, Nk]` in {1, 2, 4, 8}. Carries no gradient.
    """
    return _similarity_cap(lax.stop_gradient(k), config)


# One program: what it computes on the way is no result that `jax_debug_infs` should look at.
@functools.partial(jax.jit, static_argnames="config")
def _similarity_cap(k: Array, config: PSAConfig) -> Array:
    cap = jnp.int32(1)
    for level, threshold in config.similarity_thresholds.items():
        alike = block_similarity(k, config.block_n, level) > np.float32(threshold)
        cap = jnp.where(alike, jnp.int32(level), cap)
    return cap


@numpy_rules
def block_similarity(k: Array, block_n: int, level: int) -> Array:
    """Mean cosine between the first and last key of each whole group of `level` keys.

    Returns:
        float32 `[B, Hk, Nk]`; -inf where a block has no whole group.
    """
    kv_len = k.shape[2]
    n_k, whole = cdiv(kv_len, block_n), kv_len // level
    groups = split_tokens(k[:, :, : whole * level].astype(jnp.float32), whole, level)
    first, last = groups[..., 0, :], groups[..., -1, :]
    norms = jnp.sqrt((first * first).sum(-1)) * jnp.sqrt((last * last).sum(-1))
    cosine = (first * last).sum(-1) / jnp.maximum(norms, MIN_NORM_PRODUCT)
    spare = n_k * (block_n // level) - whole
    total = jnp.pad(cosine, ((0, 0), (0, 0), (0, spare))).reshape(*k.shape[:2], n_k, -1).sum(-1)
    counts = np.minimum(kv_len - np.arange(n_k) * block_n, block_n) // level
    mean = total / np.maximum(counts, 1).astype(np.float32)
    return jnp.where(counts > 0, mean, np.float32(-np.inf))
