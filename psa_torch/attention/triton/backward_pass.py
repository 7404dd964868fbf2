"""Backward of pyramid sparse attention, the same bit for bit from run to run.

Every row of dq, dk and dv has one writer that adds in a fixed order. Un-pooling is fused: the
log2 of the count in a logit cancels the 1/count of the mean, so what a pooled row owes to each
key it covers is its plain sum over queries; every level adds to its own sum what the level above
owes and passes that down, and level 1 writes the gradients.
"""

from typing import Any

import torch
from torch import Tensor

from psa_torch.attention.triton import configs
from psa_torch.attention.triton.coarse_gradient import launch_coarse_gradient
from psa_torch.attention.triton.configs import (
    BackwardConfig,
    CoarseGradConfig,
    HopperKeyGradConfig,
    HopperQueryGradConfig,
    LevelConfigs,
)
from psa_torch.attention.triton.hopper.units import build_units
from psa_torch.attention.triton.key_gradient import launch_key_gradient
from psa_torch.attention.triton.plan import Plan, key_plan, query_plan
from psa_torch.attention.triton.query_gradient import launch_query_gradient
from psa_torch.attention.triton.row_statistics import RowStatistics, launch_row_statistics
from psa_torch.attention.triton.rows import Rows, aligned_rows, rows_in_place, rows_of_pyramid
from psa_torch.kernels._launch import on_device_of
from psa_torch.pyramid import build_pyramid
from shared_specs.constants import LEVELS
from shared_specs.geometry import Geometry


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    levels: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    block_m: int,
    block_n: int,
    scale: float,
    is_causal: bool,
    config: BackwardConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v at the given levels, the same bit for bit from run to run.

    Args:
        dout: `[B, H, Lq, Dv]`, gradient of `out`.
        dlse: float32 `[B, H, Lq]`, gradient of `lse`, or None for 0.
        q: `[B, H, Lq, D]`; k: `[B, Hk, Lk, D]`; v: `[B, Hk, Lk, Dv]`; float32, float16 or
            bfloat16.
        levels: int32 `[B, H, Nq, Nk]`.
        out, lse: what the forward returned.
        block_m, block_n: queries and keys per block.
        scale: factor on q.k, of any sign.
        is_causal: the last query sees the last key.
        config: tile sizes; None takes them from `configs`.

    Returns:
        dq, dk, dv in the shapes and dtypes of q, k and v. Contiguous.
    """
    geometry = Geometry(q.shape[2], k.shape[2], block_m, block_n, is_causal)
    config = config or configs.backward_config(q, v, block_m, block_n)
    if isinstance(config.query, HopperQueryGradConfig):
        rows = rows_in_place(k, v, block_n)
    else:
        rows = rows_of_pyramid(build_pyramid(k, v, block_n))
    return backward_planned(
        dout,
        dlse,
        q,
        rows,
        levels,
        query_plan(levels, geometry),
        key_plan(levels, geometry),
        out,
        lse,
        geometry,
        scale=scale,
        config=config,
    )


def backward_planned(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    rows: Rows,
    levels: Tensor,
    by_query: Plan,
    by_key: Plan,
    out: Tensor,
    lse: Tensor,
    geometry: Geometry,
    *,
    scale: float,
    config: BackwardConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """`backward` for rows of a pyramid and plans that exist already.

    Where dq is not warp-specialised, the rows are those of a pyramid in one place.
    """
    q, dout, out = (configs.rows_contiguous(x) for x in (q, dout.to(q.dtype), out))
    with on_device_of(q):
        statistics = launch_row_statistics(out, dout, lse, dlse, geometry.block_m)
        shared = (q, rows, dout, statistics)
        dq = launch_query_gradient(*shared, by_query, geometry, scale=scale, config=config.query)
        plans = (by_query, by_key)
        dk, dv = key_gradients(*shared, levels, *plans, geometry, scale=scale, config=config.key)
    return dq, dk, dv


def key_gradients(
    q: Tensor,
    rows: Rows,
    dout: Tensor,
    statistics: RowStatistics,
    levels: Tensor,
    by_query: Plan,
    by_key: Plan,
    geometry: Geometry,
    *,
    scale: float,
    config: LevelConfigs,
) -> tuple[Tensor, Tensor]:
    """dk and dv of `backward_planned`, level by level."""
    batch, kv_heads, _, head_dim = rows.k.shape
    value_dim = rows.v.shape[3]
    sizes = (2, batch, kv_heads, geometry.pooled_rows, max(head_dim, value_dim))
    pooled = rows.k.new_empty(sizes, dtype=torch.float32)
    dk = rows.k.new_empty(batch, kv_heads, geometry.kv_len, head_dim)
    dv = rows.v.new_empty(batch, kv_heads, geometry.kv_len, value_dim)
    if any(isinstance(level, HopperKeyGradConfig) for level in config):
        q, dout = aligned_rows(q), aligned_rows(dout)
    shared = (q, rows, dout, statistics)
    # Coarsest first: each level adds what the level above owes to its rows.
    for g in reversed(range(len(LEVELS))):
        level: dict[str, Any] = dict(g=g, scale=scale, config=config[g])
        if isinstance(config[g], CoarseGradConfig):
            launch_coarse_gradient(*shared, by_query, by_key, pooled, geometry, **level)
        elif isinstance(config[g], HopperKeyGradConfig):
            # Gluon kernels cannot be interpreted: nothing else may import them.
            from psa_torch.attention.triton.hopper.key_gradient import launch_key_gradient_hopper

            units = build_units(levels, geometry, g=g)
            launch_key_gradient_hopper(*shared, units, pooled, dk, dv, geometry, **level)
        else:
            launch_key_gradient(*shared, by_key, pooled, dk, dv, geometry, **level)
    return dk, dv
