"""The transpose of pooling."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from psa_jax.attention.mosaic.geometry import TiledGeometry
from shared_specs.constants import LEVELS


def unpool(
    by_level: dict[int, jax.Array], geometry: TiledGeometry, shape: tuple[int, ...]
) -> jax.Array:
    """Gradients of pyramid rows to gradients of keys.

    Args:
        by_level: float32 `[B * Hk, Nk * pitch, D]` by index of the level.
        shape: of the keys, `(B, Hk, Lk, D)`.

    Returns:
        float32, of that shape.
    """
    batch, heads, kv_len, dim = shape
    total = jnp.zeros((), jnp.float32)
    for g, rows in sorted(by_level.items()):
        level, tokens = LEVELS[g], geometry.k_blocks * geometry.rows[g]
        share = rows.reshape(batch, heads, geometry.k_blocks, geometry.pitch[g], dim)
        share = share[..., : geometry.rows[g], :].reshape(batch, heads, tokens, dim)
        count = np.clip(kv_len - np.arange(tokens) * level, 1, level).astype(np.float32)
        total = total + jnp.repeat(share / count[:, None], level, axis=2)
    return total[:, :, :kv_len]
