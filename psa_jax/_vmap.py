"""How functions whose arrays all lead with a batch axis meet `vmap`."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array
from jax.custom_batching import custom_vmap

from psa_jax._switches import numpy_rules


def vmap_as_batch(run: Callable) -> Callable:
    """`run`, whose arrays all lead with a batch axis, so that `vmap` makes that axis longer.

    Mapping the implementation itself would run every loop of it as long as the busiest entry
    needs, and a kernel may have no rule for it at all.

    Args:
        run: takes arrays and returns a tuple of arrays.
    """
    run = custom_vmap(numpy_rules(run))  # which a transform may trace again, later

    @run.def_vmap
    def longer_batch(axis_size: int, in_batched: list[bool], *arrays: Array):
        mapped = [
            x if is_mapped else jnp.broadcast_to(x, (axis_size, *x.shape))
            for x, is_mapped in zip(arrays, in_batched, strict=True)
        ]
        results = run(*(x.reshape(-1, *x.shape[2:]) for x in mapped))
        results = tuple(x.reshape(axis_size, -1, *x.shape[1:]) for x in results)
        return results, (True,) * len(results)

    return run
