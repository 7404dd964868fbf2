"""Heads one after the other or all together, and what a loop starts from in either case."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from psa_jax.attention.gather.shape import Shape


def head_by_head(shape: Shape) -> bool:
    """Whether to loop over heads rather than take them all together.

    Apart, a head with a sparse mask does not wait for one with a dense mask, and its pyramid
    stays in the cache. Together, the heads of an array that is sharded over devices stay where
    they are; a loop over them would first bring every head to every device. Other devices than
    CPUs need the heads' parallelism as well.
    """
    if jax.default_backend() != "cpu" or shape.batch * shape.kv_heads == 1:
        return False
    return jax.device_count() == 1 or _inside_shard_map()


def filled_like(x: Array, value: float, dtype) -> Array:
    """An array of the shape of `x`, all `value`, for the start of a loop.

    It depends on `x` in name only, so that it is split over devices as `x` is, and inside
    `shard_map` is marked as differing between shards, as what the loop makes of it will be.
    """
    return jnp.where(False, x.astype(dtype), jnp.asarray(value, dtype))


def map_heads(one_head: Callable, shape: Shape, arrays: tuple) -> tuple[Array, ...]:
    """`one_head` over every batch entry and key head in turn: arrays `[B, Hk, ...]` in and out."""

    def of_rows(rows):
        # Each head is a row of a matrix: XLA copies arrays with axes of length 1 before it
        # loops over them.
        head = (row.reshape(1, 1, *x.shape[2:]) for row, x in zip(rows, arrays, strict=True))
        return one_head(*head)

    results = lax.map(of_rows, tuple(x.reshape(shape.batch * shape.kv_heads, -1) for x in arrays))
    return tuple(x.reshape(shape.batch, shape.kv_heads, *x.shape[3:]) for x in results)


def _inside_shard_map() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return bool(mesh.axis_names) and set(mesh.manual_axes) == set(mesh.axis_names)
