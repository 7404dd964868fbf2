"""Levels under a cost budget, by estimated defect (specification, section 6, `budget`)."""

import jax.numpy as jnp
from jax import Array, lax

from psa_jax._switches import numpy_rules
from shared_specs.budget import options, precision_bits
from shared_specs.constants import LEVELS


@numpy_rules
def budget_levels(
    defects: Array,
    candidate: Array,
    forced: Array,
    limit: Array,
    *,
    block_n: int,
    levels: tuple[int, ...] = LEVELS,
    rest_keys: int = 0,
) -> Array:
    """Levels of least total defect that a budget allows, in int32.

    Args:
        defects: float32 `[B, H, Nq, Nk, 4]`, finite and at least 0 or NaN (which counts as 0):
            what seeing the block at level 2, 4, 8 or not at all loses.
        candidate: bool `[Nq, Nk]`, blocks of which the row can see a key; the others get 0.
        forced: bool `[Nq, Nk]`, candidates that get level 1 whatever they cost.
        limit: int32 `[Nq, 1]` (a budget for each row) or `[1, 1]` (for each head), from
            `shared_specs.budget.cost_limits`.
        block_n, levels, rest_keys: as in `shared_specs.budget.budget_levels`.

    Returns:
        int32 `[B, H, Nq, Nk]`, values in {0, 1, 2, 4, 8}.

    Raises:
        ValueError: `levels` or `rest_keys` is not accepted.
    """
    choices = options(block_n, levels, rest_keys)
    bits = precision_bits(block_n)
    # A single row is a head of its own: both readings of [1, 1] are then the same group.
    dims = (-1,) if limit.shape[0] == defects.shape[2] else (-2, -1)
    forced = forced & candidate
    free = candidate & ~forced
    integers = _integer_defects(defects, free, bits, dims)
    fixed = forced.astype(jnp.int32) * block_n

    def cost_and_level(lam):
        def total_of(price: int, column: int):
            total = lam * price + (integers[..., column] if column >= 0 else 0)
            return jnp.broadcast_to(total, defects.shape[:-1])

        (name, price, column), *others = choices
        best = total_of(price, column)
        cost, level = jnp.full_like(best, price), jnp.full_like(best, name)
        for name, price, column in others:
            total = total_of(price, column)
            finer = total < best  # of equals the coarsest, which stands first
            best = jnp.where(finer, total, best)
            cost, level = jnp.where(finer, price, cost), jnp.where(finer, name, level)
        cost = jnp.where(free, cost, fixed)
        return cost.sum(dims, keepdims=True, dtype=jnp.int32), level

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) >> 1
        fits = cost_and_level(middle)[0] <= limit
        above = jnp.where(fits, low, jnp.minimum(middle + 1, high))
        return above, jnp.where(fits, middle, high)

    low = jnp.zeros((*defects.shape[:2], limit.shape[0], 1), jnp.int32)
    _, lam = lax.fori_loop(0, bits + 1, halve, (low, jnp.full_like(low, 1 << bits)))
    level = jnp.where(free, cost_and_level(lam)[1], 0)
    return jnp.where(forced, 1, level).astype(jnp.int32)


def _integer_defects(defects: Array, free: Array, bits: int, dims: tuple[int, ...]) -> Array:
    """min(floor(D * 2^(bits - x)), 2^bits) from the bits of float32 alone, in int32."""
    raw = lax.bitcast_convert_type(defects, jnp.int32)
    raw = jnp.where(jnp.isnan(defects), 0, jnp.maximum(raw, 0))
    top = jnp.where(free, raw[..., 3], 0).max(dims, keepdims=True)[..., None]
    mantissa, exponent = _split(raw)
    top_mantissa, top_exponent = _split(top)
    # The least n with 2^n >= top mantissa.
    width = 32 - lax.clz(jnp.maximum(top_mantissa - 1, 0))
    shift = exponent - top_exponent - width + bits
    most = jnp.maximum((1 << bits) >> jnp.clip(shift, 0, 30), 1)
    left = jnp.where(mantissa >= most, 1 << bits, mantissa << jnp.clip(shift, 0, 30))
    scaled = jnp.where(shift >= 0, left, mantissa >> jnp.clip(-shift, 0, 31))
    scaled = jnp.minimum(scaled, 1 << bits)
    return jnp.where((top == 0) | (mantissa == 0), 0, scaled)


def _split(raw: Array) -> tuple[Array, Array]:
    """Mantissa and exponent: the number is mantissa * 2^(exponent - 150)."""
    stored = raw >> 23
    return (raw & 0x7FFFFF) | ((stored > 0).astype(jnp.int32) << 23), jnp.maximum(stored, 1)
