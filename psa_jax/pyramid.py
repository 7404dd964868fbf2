"""Pooled keys and values (specification, section 2); the layout is `shared_specs.geometry`'s."""

import functools
import operator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from psa_jax._switches import numpy_rules
from shared_specs.constants import LEVELS
from shared_specs.geometry import cdiv, level_start, padded_length


class Pyramid(NamedTuple):
    """Keys and values at every level, `[B, Hk, P, D]` each, `P = pyramid_rows(Lk, block_n)`."""

    k: Array
    v: Array


@numpy_rules
def build_pyramid(k: Array, v: Array, block_n: int) -> Pyramid:
    """Keys and values pooled by 1, 2, 4 and 8, finest first, end to end.

    Args:
        k, v: `[B, Hk, Lk, D]`.
        block_n: keys per block.

    Returns:
        Pyramid of `[B, Hk, P, D]` in the input dtype. A row is one mean over the real keys it
        covers, accumulated in float32 (float64 stays float64); rows that cover none are zero.
    """
    return Pyramid(_pool(k, block_n, LEVELS), _pool(v, block_n, LEVELS))


@numpy_rules
def pool_levels(k: Array, v: Array, block_n: int) -> Pyramid:
    """`build_pyramid` from level 2 on, for kernels that read level 1 from `k` and `v`."""
    return Pyramid(_pool(k, block_n, LEVELS[1:]), _pool(v, block_n, LEVELS[1:]))


def accumulator(dtype) -> jnp.dtype:
    """dtype of sums over tokens: float64 for float64, float32 for everything else."""
    return jnp.dtype("float64" if jnp.dtype(dtype) == jnp.float64 else "float32")


def group_counts(length: int, groups: int, size: int, dtype) -> np.ndarray:
    """Real tokens in each of `groups` groups of `size`, at least 1 so that it can divide."""
    return np.clip(length - np.arange(groups) * size, 1, size).astype(dtype)


@numpy_rules
def group_means(x: Array, size: int, groups: int | None = None) -> Array:
    """Means over groups of `size` adjacent tokens of `[..., L, D]`, real tokens only.

    Args:
        x: `[..., L, D]`.
        size: tokens per group.
        groups: groups to return; None means `ceil(L / size)`. Further ones are zero.

    Returns:
        `[..., groups, D]`, float32 (float64 for float64).
    """
    length, dtype = x.shape[-2], accumulator(x.dtype)
    groups = cdiv(length, size) if groups is None else groups
    tiles = split_tokens(x.astype(dtype), groups, size)
    # Token by token: XLA makes one vector loop of it on a CPU, and a slow one of a reduction.
    total = functools.reduce(operator.add, (tiles[..., token, :] for token in range(size)))
    return total / group_counts(length, groups, size, dtype)[:, None]


def split_tokens(x: Array, groups: int, size: int) -> Array:
    """`[..., L, D]` to `[..., groups, size, D]`, zeros past the end."""
    padding = groups * size - x.shape[-2]
    if padding:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, padding), (0, 0)])
    return x.reshape(*x.shape[:-2], groups, size, x.shape[-1])


def _pool(x: Array, block_n: int, levels: tuple[int, ...]) -> Array:
    padded = padded_length(x.shape[-2], block_n)
    means = [group_means(x, level, padded // level) for level in levels]
    return jnp.concatenate([rows.astype(x.dtype) for rows in means], axis=-2)


@numpy_rules
def unpool(rows: Array, kv_len: int, block_n: int) -> Array:
    """The transpose of pooling: gradients of pyramid rows to gradients of keys.

    Args:
        rows: `[B, Hk, P, D]`.
        kv_len, block_n: keys, and keys per block.

    Returns:
        `[B, Hk, Lk, D]`, float32 (float64 for float64).
    """
    padded, dtype = padded_length(kv_len, block_n), accumulator(rows.dtype)
    total = jnp.zeros((), dtype)
    for level in LEVELS:
        start, groups = level_start(kv_len, block_n, level), padded // level
        share = rows[..., start : start + groups, :].astype(dtype)
        share = share / group_counts(kv_len, groups, level, dtype)[:, None]
        total = total + jnp.repeat(share, level, axis=-2)
    return total[..., :kv_len, :]
