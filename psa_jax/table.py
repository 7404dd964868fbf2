"""The packed list of blocks that kernels walk (specification, section 3)."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from psa_jax._switches import numpy_rules
from shared_specs.constants import LEVELS


class Table(NamedTuple):
    """Block ids of each row grouped by level, and how many each level has.

    Attributes:
        entries: int32 `[B, H, Nq, Nk]`, ids by level 1, 2, 4, 8, ascending inside a level,
            -1 in unused places.
        counts: int32 `[B, H, Nq, 4]`.
    """

    entries: Array
    counts: Array


@numpy_rules
def build_table(levels: Array, *, transposed: bool = False) -> Table:
    """Table of a level mask; shapes are static, so it runs on the device under `jit`.

    Args:
        levels: integer `[B, H, Nq, Nk]`; values other than 1, 2, 4, 8 mean skip.
        transposed: list the query blocks of each key block instead: `[B, H, Nk, Nq]` and
            `[B, H, Nk, 4]`.
    """
    if transposed:
        levels = jnp.swapaxes(levels, -1, -2)
    n, skip = levels.shape[-1], len(LEVELS)
    group = jnp.int32(skip)
    for place, level in enumerate(LEVELS):
        group = jnp.where(levels == level, jnp.int32(place), group)
    # One sort of (level, id) packed in an int32 groups the ids and keeps them ascending. No two are
    # equal, and a stable sort would carry an index along.
    packed = jnp.sort(group * n + jnp.arange(n, dtype=jnp.int32), axis=-1, stable=False)
    entries = jnp.where(packed < skip * n, packed % n, jnp.int32(-1))
    counts = [(group == place).sum(-1, dtype=jnp.int32) for place in range(skip)]
    return Table(entries, jnp.stack(counts, -1))
