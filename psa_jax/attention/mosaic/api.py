"""What the rest of the package calls: arrays in, kernels, arrays out."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
from jax import Array

from psa_jax._mosaic.channels import pad_channels
from psa_jax._mosaic.device import interpreter, multiprocessors
from psa_jax.attention.mosaic.config import (
    Config,
    KeyConfig,
    SlotConfig,
    WalkConfig,
    default_config,
)
from psa_jax.attention.mosaic.forward_kernel import forward_kernel
from psa_jax.attention.mosaic.geometry import CHUNK, ROWS, Geometry, cdiv
from psa_jax.attention.mosaic.key_gradient import KeyWalk, key_gradient_kernel
from psa_jax.attention.mosaic.key_plan import KeyTiles, key_plan, rows_of_level
from psa_jax.attention.mosaic.plan import MASKED, walk_plan
from psa_jax.attention.mosaic.pyramid_rows import PyramidRows, pooled_rows
from psa_jax.attention.mosaic.query_gradient import query_gradient_kernel
from psa_jax.attention.mosaic.slot_plan import Rounds, slot_plan
from psa_jax.attention.mosaic.slot_sum import slot_gradients
from psa_jax.attention.mosaic.unpool import unpool
from psa_jax.attention.mosaic.walk import Walk
from psa_jax.pyramid import pool_levels
from shared_specs.constants import LEVELS


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
        config: sizes of the kernels instead of those of `config.default_config`.

    Returns:
        out like `q`, and lse float32 `[B, H, Lq]` (natural log, -inf on rows without keys).
    """
    q_len, dim = q.shape[2:]
    q, k, v = (pad_channels(x) for x in (q, k, v))
    call = _Call(q, k, block_m, block_n, is_causal, config)
    walk = call.walk(call.config.forward)
    sign, scale = _split(scale)
    out, lse = forward_kernel(
        call.query_rows(q * sign),
        *call.pyramid_rows(k, v),
        walk_plan(levels, walk.geometry),
        walk,
        scale=scale,
        interpret=call.interpret,
    )
    return out[:, :q_len].reshape(q.shape)[..., :dim], lse[:, :q_len].reshape(q.shape[:3])


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
    call = _Call(q, k, block_m, block_n, is_causal, config)
    sign, scale = _split(scale)
    delta = (dout.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    empty = jnp.isneginf(lse)
    lse2 = jnp.where(empty, -MASKED, lse * math.log2(math.e))
    walk = call.walk(call.config.query_gradient)
    inputs = (
        call.query_rows(q * sign),
        *call.pyramid_rows(k, v),
        call.query_rows(dout.astype(q.dtype)),
        jnp.stack(
            [
                call.query_numbers(lse2, -MASKED),
                call.query_numbers(jnp.where(empty, 0.0, delta), 0.0),
            ],
            axis=1,
        ),
    )
    options = {"scale": scale, "interpret": call.interpret}
    plan = walk_plan(levels, walk.geometry)
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
        sums = slot_gradients(*inputs, slot_plan(levels, plan, rounds), rounds, **options)
        for rows, gradient in zip(by_level, sums, strict=True):
            rows[rounds.level] = gradient
    dk, dv = (unpool(rows, walk.geometry, k.shape) for rows in by_level)
    return tuple(x[..., :dim].astype(y.dtype) for x, y in ((dq, q), (dk, k), (dv, v)))


def _split(scale: float) -> tuple[float, float]:
    """`scale` as a factor for the queries and a positive one for the kernels."""
    if scale == 0:
        return 0.0, 1.0
    return math.copysign(1.0, scale), abs(scale)


@dataclasses.dataclass
class _Call:
    """Shapes of one call and what follows from them."""

    q: Array
    k: Array
    block_m: int
    block_n: int
    is_causal: bool
    config: Config | None

    def __post_init__(self) -> None:
        self.config = self.config or default_config(self.q.shape[-1], self.block_m)
        self.interpret = interpreter()

    def geometry(self, tile: int) -> Geometry:
        lengths = self.q.shape[2], self.k.shape[2]
        return Geometry(*lengths, self.block_m, self.block_n, self.is_causal, tile)

    def walk(self, config: WalkConfig) -> Walk:
        geometry = self.geometry(config.tile)
        batch, heads = self.q.shape[:2]
        return Walk(
            geometry=geometry,
            config=config,
            heads=heads,
            kv_heads=self.k.shape[1],
            batch=batch,
            blocks=self._blocks(config, batch * heads * geometry.query_tiles),
            interpreted=self.interpret is not None,
        )

    def key_walk(self) -> KeyWalk:
        config = self.config.key_gradient
        others = tuple(g for g, x in enumerate(LEVELS) if x not in self.config.slots.levels)
        tiles = KeyTiles(self.geometry(ROWS), others)
        batch, kv_heads = self.k.shape[:2]
        return KeyWalk(
            tiles=tiles,
            config=config,
            heads=self.q.shape[1],
            kv_heads=kv_heads,
            batch=batch,
            blocks=self._blocks(config, batch * kv_heads * tiles.total),
            interpreted=self.interpret is not None,
        )

    def rounds(self) -> list[Rounds]:
        config = self.config.slots
        batch, heads = self.q.shape[:2]
        geometry = self.geometry(ROWS)
        return [
            Rounds(
                geometry=geometry,
                level=LEVELS.index(level),
                config=config,
                batch=batch,
                heads=heads,
                kv_heads=self.k.shape[1],
                head_dim=self.q.shape[-1],
                blocks=self._blocks(config, batch * heads * geometry.query_blocks),
                interpreted=self.interpret is not None,
            )
            for level in config.levels
        ]

    @staticmethod
    def _blocks(config: WalkConfig | KeyConfig | SlotConfig, items: int) -> int:
        return min(config.blocks or multiprocessors(), items)

    def query_rows(self, x: Array) -> Array:
        """`[B, H, Lq, D]` as the `[B * H, Lq', D]` of the kernels."""
        rows = x.reshape(-1, *x.shape[2:])
        return self._pad(rows, self.geometry(CHUNK).padded_queries)

    def pyramid_rows(self, k: Array, v: Array) -> tuple[PyramidRows, PyramidRows]:
        """`k` and `v` at every level, for the kernels."""
        geometry = self.geometry(CHUNK)
        tokens_end = cdiv(geometry.key_blocks * self.block_n, ROWS) * ROWS

        def at_every_level(x: Array, pooled: Array) -> PyramidRows:
            return PyramidRows(
                self._pad(x.reshape(-1, *x.shape[2:]), tokens_end),
                self._pad(pooled_rows(pooled, geometry), geometry.pooled_rows + ROWS),
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

    def query_numbers(self, x: Array, fill: float) -> Array:
        """`[B, H, Lq]` as float32 `[B * H, padded_queries]`."""
        missing = self.geometry(CHUNK).padded_queries - x.shape[2]
        rows = x.astype(jnp.float32).reshape(-1, x.shape[2])
        return jnp.pad(rows, [(0, 0), (0, missing)], constant_values=fill)
