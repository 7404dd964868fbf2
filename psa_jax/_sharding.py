"""Arrays that are sharded over batch, heads or the sequence, where the program has to know of it.

Under a mesh with automatic axes, XLA splits its own operations by itself and nothing here applies;
it cannot split a kernel, so callers wrap those in `jax.shard_map`. With explicit axes (the default
of `jax.make_mesh`) every array's sharding is part of its type; batch entries and heads are
independent, so the whole call then runs shard by shard. A sequence is brought together first: its
axes go to the heads, one all-to-all for each array (DeepSpeed-Ulysses, arXiv 2309.14509).
"""

import math
from collections.abc import Callable

import jax
from jax import lax
from jax.sharding import PartitionSpec


def per_shard(run: Callable, q: jax.Array, *arrays: jax.Array, along_sequence: int = 0):
    """`run(q, *arrays)`, once per shard of batch and heads if q is explicitly sharded.

    Args:
        run: takes and returns arrays that all lead with batch and heads.
        q: `[B, H, ...]`, decides the sharding; `[B, H, L, ...]` with `along_sequence`.
        arrays: `[B, H or Hk, ...]`, brought to the same sharding.
        along_sequence: how many results, from the first on, are `[B, H, L, ...]`. They get the
            sharding of q along the sequence; with 0, q may have none. Other results stay sharded
            over heads by the axes of the sequence too.

    Raises:
        ValueError: q is sharded over another axis, or the heads do not divide over the mesh.
    """
    sharding = jax.typeof(q).sharding
    spec = tuple(sharding.spec) + (None,) * (q.ndim - len(sharding.spec))
    if all(axes is None for axes in spec):
        return run(q, *arrays)
    whole = 3 if along_sequence else 2
    if any(axes is not None for axes in spec[whole:]):
        accepted = "batch, heads and sequence" if along_sequence else "batch and heads"
        raise ValueError(
            f"q must be sharded over {accepted} only, got {sharding.spec}; bring the other axes "
            "together first, for instance with jax.sharding.reshard"
        )
    mesh = sharding.mesh
    lead = PartitionSpec(spec[0], _names(spec[1]) + _names(spec[2]) if whole == 3 else spec[1])
    for x in (q, *arrays):
        for axis, names in enumerate(lead):
            shards = _shards(mesh, names)
            if x.shape[axis] % shards:
                raise ValueError(
                    f"axis {axis} of every input must divide over the {shards} shards of q "
                    f"({sharding.spec}), got an input of shape {tuple(x.shape)}"
                )
    inputs = [jax.sharding.reshard(x, jax.NamedSharding(mesh, lead)) for x in (q, *arrays)]
    results = jax.shard_map(run, mesh=mesh, in_specs=lead, out_specs=lead)(*inputs)
    if whole == 2 or spec[2] is None:
        return results
    back = jax.NamedSharding(mesh, PartitionSpec(*spec[:3]))
    leaves, tree = jax.tree.flatten(results)
    moved = [jax.sharding.reshard(x, back) for x in leaves[:along_sequence]]
    return jax.tree.unflatten(tree, moved + leaves[along_sequence:])


def shared_out_like(q: jax.Array, arrays: list[jax.Array]) -> list[jax.Array]:
    """`arrays`, each `[B, H or Hk, ...]`, over the shards of batch and heads of an explicitly
    sharded q; as they are for any other."""
    sharding = jax.typeof(q).sharding
    lead = PartitionSpec(*sharding.spec[:2])
    if all(axes is None for axes in lead):
        return arrays
    return [jax.sharding.reshard(x, jax.NamedSharding(sharding.mesh, lead)) for x in arrays]


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


def _names(axes) -> tuple[str, ...]:
    """One entry of a PartitionSpec as a tuple."""
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def _shards(mesh, axes) -> int:
    sizes = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))
    return math.prod(sizes[name] for name in _names(axes))
