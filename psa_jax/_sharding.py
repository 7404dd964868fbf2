"""Arrays that are sharded over batch and heads, where the program has to know of it.

Under a mesh with automatic axes, XLA splits its own operations by itself and nothing here applies;
it cannot split a kernel, so callers wrap those in `jax.shard_map`. With explicit axes (the default
of `jax.make_mesh`) every array's sharding is part of its type; batch entries and heads are
independent, so the whole call then runs shard by shard.
"""

from collections.abc import Callable

import jax
from jax import lax
from jax.sharding import PartitionSpec


def per_shard(run: Callable, q: jax.Array, *arrays: jax.Array):
    """`run(q, *arrays)`, once per shard of batch and heads if q is explicitly sharded.

    Args:
        run: takes and returns arrays that all lead with batch and heads.
        q: `[B, H, ...]`, decides the sharding.
        arrays: `[B, H or Hk, ...]`, brought to the same sharding.

    Raises:
        ValueError: q is sharded over another axis, or the key heads do not divide over the mesh.
    """
    sharding = jax.typeof(q).sharding
    spec = tuple(sharding.spec) + (None,) * (q.ndim - len(sharding.spec))
    if all(axes is None for axes in spec):
        return run(q, *arrays)
    if any(axes is not None for axes in spec[2:]):
        raise ValueError(
            f"q must be sharded over batch and heads only, got {sharding.spec}; bring length and "
            "head dimension together first, for instance with jax.sharding.reshard"
        )
    mesh, lead = sharding.mesh, PartitionSpec(*spec[:2])
    for x in arrays:
        for axis, names in enumerate(spec[:2]):
            shards = _shards(mesh, names)
            if x.shape[axis] % shards:
                raise ValueError(
                    f"axis {axis} of every input must divide over the {shards} shards of q "
                    f"({sharding.spec}), got an input of shape {tuple(x.shape)}"
                )
    arrays = tuple(jax.sharding.reshard(x, jax.NamedSharding(mesh, lead)) for x in arrays)
    return jax.shard_map(run, mesh=mesh, in_specs=lead, out_specs=lead)(q, *arrays)


def vary_alike(arrays: tuple[jax.Array, ...], *others: jax.Array) -> tuple[jax.Array, ...]:
    """`arrays`, whose types say that they differ between shards where any of all these does.

    Inside `jax.shard_map` a gradient must have the type of what it is the gradient of; JAX then
    sums it over shards where an array was the same before it was marked here. Results of a kernel
    are typed as the same everywhere, whatever it was given.

    Args:
        arrays: what is marked; values stay as they are.
        others: what they are made from.
    """
    axes = [jax.typeof(x).manual_axis_type.varying for x in (*arrays, *others)]
    every = frozenset().union(*axes)
    return tuple(
        lax.pcast(x, tuple(sorted(every - own, key=str)), to="varying")
        for x, own in zip(arrays, axes, strict=False)
    )


def _shards(mesh, names) -> int:
    if names is None:
        return 1
    names = (names,) if isinstance(names, str) else names
    sizes = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))
    count = 1
    for name in names:
        count *= sizes[name]
    return count
