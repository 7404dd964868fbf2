"""What the rest of the package calls: arrays in, kernels, arrays out."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import Array

from psa_jax._mosaic.channels import pad_channels
from psa_jax._mosaic.device import interpreter, multiprocessors
from psa_jax._switches import of_32_bits
from psa_jax.attention.mosaic.coarse_gradient.plan import Rounds, coarse_plan
from psa_jax.attention.mosaic.coarse_gradient.sums import coarse_gradients
from psa_jax.attention.mosaic.configs import (
    CoarseConfig,
    Config,
    KeyConfig,
    WalkConfig,
    default_config,
)
from psa_jax.attention.mosaic.forward_kernel import forward_kernel
from psa_jax.attention.mosaic.geometry import CHUNK, ROWS, TiledGeometry
from psa_jax.attention.mosaic.key_gradient import KeyWalk, key_gradient_kernel
from psa_jax.attention.mosaic.key_plan import KeyTiles, key_plan, rows_of_level
from psa_jax.attention.mosaic.pyramid_rows import PyramidRows, pooled_rows
from psa_jax.attention.mosaic.query_gradient import query_gradient_kernel
from psa_jax.attention.mosaic.query_plan import MASKED, query_plan
from psa_jax.attention.mosaic.unpool import unpool
from psa_jax.attention.mosaic.walk import Walk
from psa_jax.pyramid import pool_levels
from shared_specs.constants import LEVELS, LOG2E
from shared_specs.geometry import Geometry, cdiv


@of_32_bits
def forward(
    q: Array,
    k: Array,
    v: Array,
    levels: Array,
    *,
    block_m: int,
    block_n: int,
    scale: float,
    is_causal: bool,
    config: Config | None = None,
) -> tuple[Array, Array]:
    """Attention over the pyramid at the given levels (specification, section 4).

    Args:
        q: `[B, H, Lq, D]`, float16 or bfloat16, D up to 128.
        k, v: `[B, Hk, Lk, D]`, same dtype.
        levels: int32 `[B, H, Nq, Nk]`, values in {0, 1, 2, 4, 8}.
        block_m, block_n: queries and keys per block.
        scale: factor on q.k.
        is_causal: whether a row sees only pooled tokens that end at or before it.
        config: sizes of the kernels instead of those of `configs.default_config`.

    Returns:
        out like `q`, and lse float32 `[B, H, Lq]` (natural log, -inf on rows without keys).
    """
    q_len, dim = q.shape[2:]
    q, k, v = (pad_channels(x) for x in (q, k, v))
    call = _Call.of(q, k, block_m, block_n, is_causal, config)
    walk = call.walk(call.config.forward)
    sign, scale = _split(scale)
    out, lse = forward_kernel(
        call.query_rows(q * sign),
        *call.key_rows(k, v),
        query_plan(levels, walk.geometry),
        walk,
        scale=scale,
        interpret=call.interpret,
    )
    return out[:, :q_len].reshape(q.shape)[..., :dim], lse[:, :q_len].reshape(q.shape[:3])


@of_32_bits
def backward(
    dout: Array,
    dlse: Array | None,
    q: Array,
    k: Array,
    v: Array,
    levels: Array,
    out: Array,
    lse: Array,
    *,
    block_m: int,
    block_n: int,
    scale: float,
    is_causal: bool,
    config: Config | None = None,
) -> tuple[Array, Array, Array]:
    """Gradients of `sum(out * dout) + sum(lse * dlse)` with the levels held fixed.

    Args:
        dout: `[B, H, Lq, D]`.
        dlse: float32 `[B, H, Lq]`, or None for 0; ignored on rows without keys.
        out, lse: what `forward` returned.

    Returns:
        dq, dk, dv in the dtypes and shapes of q, k and v.
    """
    dim = q.shape[-1]
    dout, q, k, v, out = (pad_channels(x) for x in (dout, q, k, v, out))
    call = _Call.of(q, k, block_m, block_n, is_causal, config)
    sign, scale = _split(scale)
    delta = (dout.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    empty = jnp.isneginf(lse)
    lse2 = jnp.where(empty, -MASKED, lse * LOG2E)
    walk = call.walk(call.config.query_gradient)
    inputs = (
        call.query_rows(q * sign),
        *call.key_rows(k, v),
        call.query_rows(dout.astype(q.dtype)),
        jnp.stack(
            [
                call.query_statistics(lse2, -MASKED),
                call.query_statistics(jnp.where(empty, 0.0, delta), 0.0),
            ],
            axis=1,
        ),
    )
    options = {"scale": scale, "interpret": call.interpret}
    plan = query_plan(levels, walk.geometry)
    dq = query_gradient_kernel(*inputs, plan, walk, **options)
    dq = dq[:, : q.shape[2]].reshape(q.shape) * sign
    key_walk = call.key_walk()
    gradients = key_gradient_kernel(
        *inputs, key_plan(levels, k.shape[1], key_walk.tiles), key_walk, **options
    )
    by_level = [
        {g: rows_of_level(rows, key_walk.tiles, g) for g in key_walk.tiles.levels}
        for rows in gradients
    ]
    for rounds in call.rounds():
        sums = coarse_gradients(*inputs, coarse_plan(levels, plan, rounds), rounds, **options)
        for rows, gradient in zip(by_level, sums, strict=True):
            rows[rounds.level] = gradient
    dk, dv = (unpool(rows, walk.geometry, k.shape) for rows in by_level)
    dq, dk, dv = (x[..., :dim].astype(y.dtype) for x, y in ((dq, q), (dk, k), (dv, v)))
    return dq, dk, dv


def _split(scale: float) -> tuple[float, float]:
    """`scale` as a factor for the queries and a positive one for the kernels."""
    if scale == 0:
        return 0.0, 1.0
    return math.copysign(1.0, scale), abs(scale)


@dataclasses.dataclass(frozen=True)
class _Call(Geometry):
    """Sizes of one call and what follows from them."""

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    config: Config
    interpret: Any

    @classmethod
    def of(
        cls, q: Array, k: Array, block_m: int, block_n: int, is_causal: bool, config: Config | None
    ) -> _Call:
        """From q `[B, H, Lq, D]` and k `[B, Hk, Lk, D]` as the kernels have them."""
        (batch, heads, q_len, head_dim), (kv_heads, kv_len) = q.shape, k.shape[1:3]
        return cls(
            q_len, kv_len, block_m, block_n, is_causal,
            batch, heads, kv_heads, head_dim,
            config or default_config(head_dim, block_m), interpreter(),
        )  # fmt: skip

    def tiled(self, tile: int) -> TiledGeometry:
        lengths = self.q_len, self.kv_len
        return TiledGeometry(*lengths, self.block_m, self.block_n, self.is_causal, tile)

    def walk(self, config: WalkConfig) -> Walk:
        geometry = self.tiled(config.tile)
        return Walk(
            geometry=geometry,
            config=config,
            heads=self.heads,
            kv_heads=self.kv_heads,
            batch=self.batch,
            blocks=self._blocks(config, self.batch * self.heads * geometry.query_tiles),
            interpreted=self.interpret is not None,
        )

    def key_walk(self) -> KeyWalk:
        config = self.config.key_gradient
        others = tuple(g for g, x in enumerate(LEVELS) if x not in self.config.coarse.levels)
        tiles = KeyTiles(self.tiled(ROWS), others)
        return KeyWalk(
            tiles=tiles,
            config=config,
            heads=self.heads,
            kv_heads=self.kv_heads,
            batch=self.batch,
            blocks=self._blocks(config, self.batch * self.kv_heads * tiles.total),
            interpreted=self.interpret is not None,
        )

    def rounds(self) -> list[Rounds]:
        config = self.config.coarse
        geometry = self.tiled(ROWS)
        items = self.batch * self.heads * geometry.padded_q_blocks
        return [
            Rounds(
                geometry=geometry,
                level=LEVELS.index(level),
                config=config,
                batch=self.batch,
                heads=self.heads,
                kv_heads=self.kv_heads,
                head_dim=self.head_dim,
                blocks=self._blocks(config, items),
                interpreted=self.interpret is not None,
            )
            for level in config.levels
        ]

    @staticmethod
    def _blocks(config: WalkConfig | KeyConfig | CoarseConfig, items: int) -> int:
        return min(config.blocks or multiprocessors(), items)

    def query_rows(self, x: Array) -> Array:
        """`[B, H, Lq, D]` as the `[B * H, Lq', D]` of the kernels."""
        rows = x.reshape(-1, *x.shape[2:])
        return self._pad(rows, self.tiled(CHUNK).padded_queries)

    def key_rows(self, k: Array, v: Array) -> tuple[PyramidRows, PyramidRows]:
        """`k` and `v` at every level, for the kernels."""
        geometry = self.tiled(CHUNK)
        tokens_end = cdiv(self.padded_len, ROWS) * ROWS

        def at_every_level(x: Array, pooled: Array) -> PyramidRows:
            return PyramidRows(
                self._pad(x.reshape(-1, *x.shape[2:]), tokens_end),
                self._pad(pooled_rows(pooled, geometry), geometry.stored_rows + ROWS),
            )

        pooled = pool_levels(k, v, self.block_n)
        return at_every_level(k, pooled.k), at_every_level(v, pooled.v)

    def _pad(self, rows: Array, end: int) -> Array:
        """`[heads, L, D]` with zeros after row `L`, so that rows up to `end` can be copied.

        A copy past the end of an array brings zeros and writes nothing, but only whole chunks
        can be addressed, and the interpreter has no such copies.
        """
        length = rows.shape[1]
        padded = cdiv(length, CHUNK) * CHUNK if self.interpret is None else end
        return jnp.pad(rows, [(0, 0), (0, padded - length), (0, 0)]) if padded > length else rows

    def query_statistics(self, x: Array, fill: float) -> Array:
        """`[B, H, Lq]` as float32 `[B * H, padded_queries]`."""
        missing = self.tiled(CHUNK).padded_queries - x.shape[2]
        rows = x.astype(jnp.float32).reshape(-1, x.shape[2])
        return jnp.pad(rows, [(0, 0), (0, missing)], constant_values=fill)
