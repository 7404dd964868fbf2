"""What stands for queries and keys in the products: grouped means or sampled tokens.

Means of 16-bit inputs are kept in float16 scaled by a power of two per block, at the speed of
bfloat16 with eight times its precision; scaling is exact and keeps any finite input in range.
Sampled tokens stay as they are.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from psa_jax.pyramid import group_counts, split_tokens
from shared_specs.config import PSAConfig
from shared_specs.geometry import cdiv
from shared_specs.sampling import SamplePlan


@dataclasses.dataclass(frozen=True)
class Samples:
    """Rows of one side, whole blocks of them.

    Where a block has fewer real tokens than rows, its last real row is repeated: a repeat
    changes no maximum, so that nothing but causality needs a mask.

    Attributes:
        values: 16-bit `[B, heads, blocks, count, D]`.
        scale: float32 `[B, heads, blocks]`, factor on the rows of a block.
        first, last: int `[blocks, count]`, first and last token position each row stands for.
    """

    values: Array
    scale: Array
    first: np.ndarray
    last: np.ndarray


def samples(x: Array, config: PSAConfig, *, keys: bool, multiple: int = 1) -> Samples:
    """Rows of the queries or the keys `x` for `config.importance`, 'pooled' or 'sampled'.

    Args:
        x: float16 or bfloat16 `[B, heads, L, D]`.
        keys: whether `x` holds keys.
        multiple: blocks are repeated up to a multiple of this.
    """
    block = config.block_n if keys else config.block_m
    blocks = cdiv(x.shape[2], block)
    blocks = cdiv(blocks, multiple) * multiple
    if config.importance == "pooled":
        return _means(x, block, config.importance_pool, blocks)
    return _tokens(x, config.key_samples if keys else config.query_samples, blocks)


def _means(x: Array, block: int, size: int, blocks: int) -> Samples:
    *lead, length, dim = x.shape
    groups = cdiv(length, size)
    tiles = split_tokens(x, groups, size)
    # Spelt out: elementwise, so that it becomes one pass with what follows.
    total: Any = sum(tiles[..., i, :].astype(jnp.float32) for i in range(size))
    means = total / group_counts(length, groups, size, np.float32)[:, None]
    count = block // size
    missing = blocks * count - groups
    if missing:
        means = jnp.pad(means, [(0, 0)] * len(lead) + [(0, missing), (0, 0)], mode="edge")
    means = means.reshape(*lead, blocks, count, dim)
    scale, inverse = _powers_of_two(jnp.abs(means).max((-2, -1)))
    values = (means * inverse[..., None, None]).astype(jnp.float16)
    at = np.minimum(np.arange(blocks * count), groups - 1).reshape(blocks, count)
    return Samples(values, scale, at * size, np.minimum(at * size + size, length) - 1)


def _powers_of_two(top: Array) -> tuple[Array, Array]:
    """The power of two at or below each element, and its inverse, both normal numbers."""
    exponent = (lax.bitcast_convert_type(top, jnp.int32) >> 23) & 0xFF
    exponent = jnp.clip(exponent, 1, 253)
    power, inverse = (
        lax.bitcast_convert_type(bits << 23, jnp.float32) for bits in (exponent, 254 - exponent)
    )
    return power, inverse


def _tokens(x: Array, plan: SamplePlan, blocks: int) -> Samples:
    *lead, length, dim = x.shape
    starts = np.minimum(np.arange(blocks), cdiv(length, plan.block) - 1) * plan.block
    at = np.minimum(starts[:, None] + plan.offsets, length - 1)
    values = x[:, :, at.ravel()].reshape(*lead, *at.shape, dim)
    return Samples(values, jnp.ones((*lead, blocks), jnp.float32), at, at)
