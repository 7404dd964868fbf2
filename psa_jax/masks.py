"""Serial forms of a level mask and its density (specification, sections 3 and 9).

Values are checked where they are known: concrete arrays on the CPU. Inside `jit` and on a GPU a
block with a value outside the accepted set is skipped, and an id outside the mask is ignored.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer

# , lax
from psa_jax._arrays import is_known
from psa_jax._switches import numpy_rules
from shared_specs import masks as specification
from shared_specs.constants import MASK_LEVELS
from shared_specs.masks import SEPARATOR


@numpy_rules
def to_segments(levels: Array, scores: Array | None = None) -> Array:
    """Dense levels to `new_mask_type`.

    Args:
        levels: integer `[..., Nq, Nk]`, values in {0, 1, 2, 4, 8}.
        scores: `[..., Nq, Nk]`; with them the ids of a segment stand by descending score (ties
            to the lower id, NaN last), without by ascending id.

    Returns:
        int32 `[..., Nq, Nk + 5]`: block ids of levels 1, 2, 4, 8, 0, each segment closed by -1.

    Raises:
        TypeError: `levels` is not an integer array.
        ValueError: `scores` has another shape, or a level is outside the set.
    """
    check_level_values(levels)
    n = levels.shape[-1]
    segment = jnp.int32(len(MASK_LEVELS) - 1)
    for place, level in enumerate(MASK_LEVELS[:-1]):
        segment = jnp.where(levels == level, jnp.int32(place), segment)
    ids = lax.broadcasted_iota(jnp.int32, levels.shape, levels.ndim - 1)
    # Ids differ, so no two keys are equal, and a stable sort would carry an index along.
    if scores is None:
        ordered, order = lax.sort((segment, ids), num_keys=2, is_stable=False)
    else:
        if scores.shape != levels.shape:
            raise ValueError(
                f"scores must have the shape of levels {levels.shape}, got {scores.shape}"
            )
        scores = lax.stop_gradient(scores)
        worst = jnp.where(jnp.isnan(scores), jnp.inf, -scores)
        ordered, _, order = lax.sort((segment, worst, ids), num_keys=3, is_stable=False)
    # A block's place is its rank plus the separators that stand before its segment.
    places = jnp.arange(n, dtype=jnp.int32) + ordered
    blank = jnp.full((*levels.shape[:-1], n + len(MASK_LEVELS)), SEPARATOR, jnp.int32)
    return put_along_last(blank, places, order)


@numpy_rules
def from_segments(segments: Array) -> Array:
    """`new_mask_type` to dense levels, int32 `[..., Nq, Nk]`.

    Raises:
        TypeError: `segments` is not an integer array.
        ValueError: the last axis is shorter than 6, or a row does not hold five closed segments
            that name every block once.
    """
    _require_integers("segments", segments)
    if segments.ndim < 1 or segments.shape[-1] <= len(MASK_LEVELS):
        raise ValueError(
            f"segments must be [..., Nq, Nk + 5] with Nk >= 1, got {tuple(segments.shape)}"
        )
    _check_segments(segments)
    n = segments.shape[-1] - len(MASK_LEVELS)
    segment = jnp.cumsum(segments == SEPARATOR, axis=-1, dtype=jnp.int32)
    value = jnp.int32(0)
    for place, level in enumerate(MASK_LEVELS):
        value = jnp.where(segment == place, jnp.int32(level), value)
    # Separators and ids outside the mask go to a column of their own, cut off below.
    ids = jnp.where((segments >= 0) & (segments < n), segments, n).astype(jnp.int32)
    return put_along_last(jnp.zeros((*segments.shape[:-1], n + 1), jnp.int32), ids, value)[..., :n]


@numpy_rules
def density(levels: Array, *, candidates: Any = None, rest_share: float = 0.0) -> float | Array:
    """Mean of 1/level (`rest_share` at level 0) over the candidate blocks (section 9).

    Args:
        levels: integer `[..., Nq, Nk]`.
        candidates: integer `[Nq]`, the leading blocks of each row that can be seen at all (see
            `shared_specs.selection.candidate_blocks`); None means all of them.
        rest_share: of a block of level 0, `PSAConfig.rest_share`.

    Returns:
        A Python float, or inside `jit` a float32 scalar.
    """
    check_level_values(levels)
    if not isinstance(levels, Tracer):
        candidates = None if candidates is None else np.asarray(candidates)
        return specification.density(
            np.asarray(levels), candidates=candidates, rest_share=rest_share
        )
    cost = jnp.where(levels > 0, 1.0 / jnp.maximum(levels, 1).astype(jnp.float32), rest_share)
    if candidates is None:
        return cost.mean()
    seen = jnp.arange(levels.shape[-1]) < jnp.asarray(candidates)[:, None]
    total = seen.sum(dtype=jnp.float32) * float(np.prod(levels.shape[:-2]))
    return (cost * seen).sum() / jnp.maximum(total, 1)


def check_level_values(levels: Array) -> None:
    """Raise if `levels` is not integer, or is known to hold anything but 0, 1, 2, 4, 8."""
    _require_integers("levels", levels)
    if is_known(levels):
        specification.check_levels(np.asarray(levels))


def check_levels_of_form(levels: Array, form: str) -> None:
    """Raise if levels are known not to be levels, in the form 'dense' or 'segments'."""
    (_check_segments if form == "segments" else check_level_values)(levels)


def put_along_last(x: Array, index: Array, values: Array) -> Array:
    """`x` with `values` written at `index` along the last axis, row by row; indices are in bounds.

    Batched row by row, so that a sharded leading axis stays where it is.
    """

    def put(row, at, value):
        return row.at[at].set(value, mode="promise_in_bounds")

    for _ in range(x.ndim - 1):
        put = jax.vmap(put)
    return put(x, index, values)


def _check_segments(segments: Array) -> None:
    if is_known(segments):
        specification.from_segments(np.asarray(segments))


def _require_integers(name: str, x: Any) -> None:
    dtype = getattr(x, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"{name} must be an integer array, got {dtype or type(x).__name__}")
