"""What the rest of the package calls: shapes in, kernels, shapes out."""

from __future__ import annotations

import contextlib
import contextvars

import jax
import jax.numpy as jnp

from psa_jax.attention.mosaic.config import WalkConfig, forward_config
from psa_jax.attention.mosaic.forward import forward_kernel
from psa_jax.attention.mosaic.geometry import Geometry
from psa_jax.attention.mosaic.plan import kernel_pyramid, walk_plan
from psa_jax.attention.mosaic.walk import Walk
from psa_jax.pyramid import build_pyramid


def forward(
    q, k, v, levels, *, block_m, block_n, scale, is_causal, config: WalkConfig | None = None, interpret=None
):
    config = config or forward_config(q.shape[-1], block_m)
    geometry = Geometry(q.shape[2], k.shape[2], block_m, block_n, is_causal, config.tile)
    batch, heads, q_len, head_dim = q.shape
    walk = Walk(geometry, config, heads, k.shape[1], batch, blocks=min(config.blocks or 132, batch*heads*geometry.query_tiles), interpreted=interpret is not None)
    if scale < 0:
        q, scale = -q, -scale
    pyramid = build_pyramid(k, v, block_n)
    rows = q.reshape(-1, q_len, head_dim)
    pad = (geometry.padded_queries if interpret is not None else -(-q_len//8)*8) - q_len
    if pad:
        rows = jnp.pad(rows, [(0, 0), (0, pad), (0, 0)])
    out, lse = forward_kernel(
        rows,
        kernel_pyramid(pyramid.k, geometry),
        kernel_pyramid(pyramid.v, geometry),
        walk_plan(levels, geometry),
        walk,
        scale=scale,
        interpret=interpret,
    )
    out = out[:, :q_len].reshape(q.shape)
    return out, lse[:, :q_len].reshape(q.shape[:3])
