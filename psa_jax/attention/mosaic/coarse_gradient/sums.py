"""Sums of the slots: gradients of a coarse level's pyramid rows.

Per round one kernel fills slots and one sums those that a key block's list names, always in the
same order, so results repeat bit for bit. Per listed pair of blocks `2 * rows * D` values of 16
bits are written and read once: at H=24, L=32,768, D=128 and 20 % at level 8, 2.6 GB each way.
"""

from __future__ import annotations

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from psa_jax._mosaic.launch import launch
from psa_jax.attention.mosaic.coarse_gradient.partials import partials_kernel
from psa_jax.attention.mosaic.coarse_gradient.plan import CoarsePlan, Rounds
from shared_specs.constants import LEVELS

THREADS = 128
"""Of a thread block of the sum."""

LOAD_BYTES = 16
"""What one thread loads at a time, at most."""


def coarse_gradients(
    q, k, v, dout, statistics, plan: CoarsePlan, rounds: Rounds, *, scale, interpret
) -> tuple[jax.Array, jax.Array]:
    """Gradients of one level's pyramid rows.

    Args:
        q, dout, k, v, statistics, scale: as for the dq kernel.

    Returns:
        dk, dv: float32 `[B * Hk, Nk * pitch, D]`.
    """
    head_dim = q.shape[-1]
    rows = rounds.heads_per_round * rounds.geometry.k_blocks * rounds.pitch

    def run(number, before):
        number = number[None]
        slots = partials_kernel(
            number, q, k, v, dout, statistics, plan, rounds, scale=scale, interpret=interpret
        )
        return sums_kernel(number, slots, before, plan, rounds, interpret=interpret)

    if rounds.splits == 1:
        numbers_of_rounds = jnp.arange(rounds.head_rounds, dtype=jnp.int32)
        _, sums = lax.scan(lambda _, n: (None, run(n, None)), None, numbers_of_rounds)
    else:
        zeros = (jnp.zeros((rows, head_dim), jnp.float32),) * 2

        def heads(_, first):
            parts = first + jnp.arange(rounds.splits, dtype=jnp.int32)
            return None, lax.scan(lambda sums, n: (run(n, sums), None), zeros, parts)[0]

        firsts = jnp.arange(rounds.head_rounds, dtype=jnp.int32) * rounds.splits
        _, sums = lax.scan(heads, None, firsts)
    return tuple(x.reshape(rounds.batch * rounds.kv_heads, -1, head_dim) for x in sums)


def sums_kernel(number, slots, before, plan: CoarsePlan, rounds: Rounds, *, interpret):
    """Sum the slots of one round, and what earlier rounds had.

    Args:
        number: int32 `[1]`, which round.
        slots: dk and dv in slots, `[slots * pitch, D]`.
        before: dk and dv float32 `[key blocks of the round * pitch, D]`, or None.

    Returns:
        dk and dv like `before`.
    """
    head_dim = slots[0].shape[-1]
    units = rounds.heads_per_round * rounds.geometry.k_blocks
    rows = jax.ShapeDtypeStruct((units * rounds.pitch, head_dim), jnp.float32)

    def coarse_sums(inputs, *sum_refs):
        number_ref, counts, listed, slot_refs, before_refs = inputs
        unit = lax.axis_index("block")
        row = number_ref[0] * units + unit
        rows = pl.ds(pl.multiple_of(unit * rounds.pitch, rounds.pitch), rounds.pitch)
        sums = _sum(counts[row], listed.at[row], slot_refs, rounds)
        for i, (total, target) in enumerate(zip(sums, sum_refs, strict=True)):
            total = total * float(LEVELS[rounds.level])
            if before_refs is not None:
                total = before_refs[i].at[rows][...] + total
            target.at[rows][...] = total

    return launch(
        coarse_sums,
        (number, plan.counts, plan.slots, slots, before),
        out_type=(rows, rows),
        blocks=units,
        interpret=interpret,
    )


def _sum(count, listed, refs, rounds: Rounds):
    """Sum of the first `count` listed slots of both arrays, float32 `[pitch, D]`."""
    shape = (rounds.pitch, refs[0].shape[-1])
    batch = max(rounds.config.batch_rows // rounds.pitch, 1)

    def step(i, sums):
        # Many loads at a time; those past the end take the last slot again, and count nothing.
        places = [i * batch + x for x in range(batch)]
        slots = [listed[jnp.minimum(place, count - 1)] for place in places]
        loads = [[_load(ref, slot, shape, rounds) for ref in refs] for slot in slots]
        for place, values in zip(places, loads, strict=True):
            there = lax.broadcast_in_dim(place < count, shape, ())
            sums = tuple(
                total + jnp.where(there, x.astype(jnp.float32), jnp.zeros(shape, jnp.float32))
                for total, x in zip(sums, values, strict=True)
            )
        return sums

    zeros = jnp.zeros(shape, jnp.float32)
    return lax.fori_loop(0, lax.div(count + batch - 1, batch), step, (zeros, zeros))


def _load(ref, slot, shape, rounds: Rounds):
    x = ref.at[pl.ds(pl.multiple_of(slot * rounds.pitch, rounds.pitch), rounds.pitch)][...]
    if rounds.interpreted:
        return x
    width = min(LOAD_BYTES // x.dtype.itemsize, shape[0] * shape[1] // THREADS)
    return plgpu.layout_cast(x, plgpu.Layout.WG_STRIDED(shape, vec_size=width))
