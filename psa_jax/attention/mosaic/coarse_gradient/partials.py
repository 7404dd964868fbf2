"""The kernel that fills slots: gradients of coarse pyramid rows, one query block at a time.

A query block is resident and its listed rows stream past it, packed into tiles of one level. The
two consumers take tiles in turn. A tile's keys are the rows of its products, so a consumer needs
no sum with the other; the gradients replace the tile in shared memory and leave from there.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from psa_jax._mosaic import products
from psa_jax._mosaic.launch import launch, scratch
from psa_jax.attention.mosaic.coarse_gradient.plan import (
    FIRST_ENTRY,
    FULL,
    LISTED,
    TAIL,
    CoarsePlan,
    Rounds,
)
from psa_jax.attention.mosaic.geometry import CHUNK, CONSUMERS, ROWS
from psa_jax.attention.mosaic.query_plan import MASKED, unpack_covers
from shared_specs.constants import LEVELS, LOG2E


@scratch
class Scratch:
    keys: Any
    values: Any
    covers: Any
    tiles_full: Any
    covers_full: Any
    tiles_empty: Any
    queries: Any
    dout: Any
    statistics: Any
    queries_full: Any
    queries_empty: Any


@dataclasses.dataclass(frozen=True)
class Place:
    """One query block of a round.

    Attributes:
        head, kv_head: of all heads.
        query: first query row.
        entries: row of `CoarsePlan.entries`.
        spans: row of `CoarsePlan.spans` and `.tail_covers`.
        slot_row: first row of its slots in the workspace.
    """

    head: jax.Array
    kv_head: jax.Array
    query: jax.Array
    entries: jax.Array
    spans: jax.Array
    slot_row: jax.Array


def locate(rounds: Rounds, number: jax.Array, n: jax.Array) -> Place:
    """The `n`-th query block of this thread block in round `number`."""
    heads = rounds.heads_per_round * rounds.group
    item = lax.axis_index("block") + n * rounds.blocks
    local_head = lax.rem(item, heads)
    # The last query blocks first: when causal, they have the longest rows.
    local_query = rounds.queries_per_round - 1 - lax.div(item, heads)
    head = lax.div(number, rounds.splits) * heads + local_head
    query = lax.rem(number, rounds.splits) * rounds.queries_per_round + local_query
    slots = (local_head * rounds.queries_per_round + local_query) * rounds.slots_per_item
    return Place(
        head=head,
        kv_head=lax.div(head, rounds.group),
        query=query * rounds.geometry.block_m,
        entries=head * rounds.geometry.padded_q_blocks + query,
        spans=head * rounds.padded_queries + query,
        slot_row=slots * rounds.pitch,
    )


def partials_kernel(
    number, q, k, v, dout, statistics, plan: CoarsePlan, rounds: Rounds, *, scale, interpret
):
    """Run the kernel for one round.

    Args:
        number: int32 `[1]`, which round.
        q, dout, k, v, statistics, scale: as for the dq kernel.

    Returns:
        dk, dv: `[slots * pitch, D]` in the dtype of q, what one key is owed: the gradients of the
        slots' pyramid rows divided by the level, so that float16 holds them whenever it holds the
        result. Slots that no query block lists are not written.
    """
    head_dim, dtype = q.shape[-1], q.dtype
    config, block_m = rounds.config, rounds.geometry.block_m
    keys = products.operand((config.tiles, ROWS, head_dim), dtype)
    queries = products.operand((config.query_stages, block_m, head_dim), dtype)
    memory = Scratch(
        keys=keys,
        values=keys,
        covers=plgpu.SMEM((config.tiles, ROWS), jnp.int32),
        tiles_full=plgpu.Barrier(num_arrivals=2 * rounds.slots_per_tile, num_barriers=config.tiles),
        covers_full=plgpu.Barrier(num_barriers=config.tiles),
        tiles_empty=plgpu.Barrier(num_barriers=config.tiles),
        queries=queries,
        dout=queries,
        statistics=plgpu.SMEM((config.query_stages, 2, block_m), jnp.float32),
        queries_full=plgpu.Barrier(num_arrivals=3, num_barriers=config.query_stages),
        queries_empty=plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=config.query_stages),
    )
    rows = rounds.items * rounds.slots_per_item * rounds.pitch
    workspace = jax.ShapeDtypeStruct((rows, head_dim), dtype)
    sources = (q, dout, statistics, k.pooled, v.pooled)
    read = (plan.entries, plan.spans, plan.tail_covers)

    def coarse_partials(inputs, dk_ref, dv_ref, memory):
        _warpgroup(*inputs, dk_ref, dv_ref, memory, rounds=rounds, scale=scale)

    return launch(
        coarse_partials,
        (number, sources, *read),
        out_type=(workspace, workspace),
        scratch=memory,
        blocks=rounds.blocks,
        warpgroups=CONSUMERS + 1,
        interpret=interpret,
    )


def _warpgroup(
    number_ref,
    sources,
    entries,
    spans,
    tail_covers,
    dk_ref,
    dv_ref,
    memory: Scratch,
    *,
    rounds: Rounds,
    scale: float,
):
    warpgroup = lax.axis_index("warpgroup")
    number = number_ref[0]
    items = lax.div(rounds.items - lax.axis_index("block") + rounds.blocks - 1, rounds.blocks)
    start = jnp.int32(0), jnp.int32(0)

    @pl.when(warpgroup < CONSUMERS)
    def _():
        plgpu.set_max_registers(rounds.config.multiply_registers, action="increase")
        consumer = functools.partial(
            _consume, number, spans, dk_ref, dv_ref, memory, rounds, scale, warpgroup
        )
        tiles, _ = lax.fori_loop(0, items, consumer, start)
        last = tiles - 1 - lax.rem(tiles + 1 + warpgroup, CONSUMERS)
        pl.when(last >= 0)(lambda: _hand_back(memory, rounds, last))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == CONSUMERS)
    def _():
        plgpu.set_max_registers(rounds.config.copy_registers, action="decrease")
        producer = functools.partial(
            _produce, number, sources, entries, spans, tail_covers, memory, rounds
        )
        done = lax.fori_loop(0, items, producer, start)
        for ring, empty, count in (
            (rounds.config.tiles, memory.tiles_empty, done[0]),
            (rounds.config.query_stages, memory.queries_empty, done[1]),
        ):

            def wait(i, _, ring=ring, empty=empty):
                plgpu.barrier_wait(empty.at[lax.rem(i, ring)])

            lax.fori_loop(jnp.maximum(count - ring, 0), count, wait, None)


def _produce(number, sources, entries, spans, tail_covers, memory, rounds: Rounds, n, done):
    """Copy one query block and its tiles; carries the tiles and query blocks copied so far."""
    q_ref, dout_ref, statistics_ref, k_ref, v_ref = sources
    config, geometry, pitch = rounds.config, rounds.geometry, rounds.pitch
    place = locate(rounds, number, n)
    tiles_done, queries_done = done
    full = spans[place.spans, FULL]
    tiles = full + spans[place.spans, TAIL]

    @pl.when(tiles > 0)
    def _():
        stage = lax.rem(queries_done, config.query_stages)
        pl.when(queries_done >= config.query_stages)(
            lambda: plgpu.barrier_wait(memory.queries_empty.at[stage])
        )
        rows = pl.ds(pl.multiple_of(place.query, ROWS), geometry.block_m)
        for source, target in (
            (q_ref.at[place.head, rows], memory.queries),
            (dout_ref.at[place.head, rows], memory.dout),
            (statistics_ref.at[place.head, :, rows], memory.statistics),
        ):
            plgpu.copy_gmem_to_smem(source, target.at[stage], memory.queries_full.at[stage])

    first, listed = spans[place.spans, FIRST_ENTRY], spans[place.spans, LISTED]

    def copy_tile(t, _):
        stage = lax.rem(tiles_done + t, config.tiles)
        pl.when(tiles_done + t >= config.tiles)(
            lambda: plgpu.barrier_wait(memory.tiles_empty.at[stage])
        )
        for c in range(rounds.slots_per_tile):
            # Past the last entry its rows are copied again; no key is covered there.
            entry = jnp.minimum(t * rounds.slots_per_tile + c, listed - 1)
            block = entries[place.entries, first + entry]
            start = geometry.start[rounds.level] - geometry.first_pooled + block * pitch
            source_rows = pl.ds(pl.multiple_of(start, CHUNK), pitch)
            for source, target in ((k_ref, memory.keys), (v_ref, memory.values)):
                plgpu.copy_gmem_to_smem(
                    source.at[place.kv_head, source_rows],
                    target.at[stage, pl.ds(c * pitch, pitch)],
                    memory.tiles_full.at[stage],
                )

        @pl.when(t >= full)
        def _():
            plgpu.copy_gmem_to_smem(
                tail_covers.at[place.spans, t - full],
                memory.covers.at[stage],
                memory.covers_full.at[stage],
            )

    lax.fori_loop(0, tiles, copy_tile, None)
    return tiles_done + tiles, queries_done + (tiles > 0).astype(jnp.int32)


def _hand_back(memory: Scratch, rounds: Rounds, tile: jax.Array) -> None:
    """Let the producer have a tile's buffers, once the gradients in them have left."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(memory.tiles_empty.at[lax.rem(tile, rounds.config.tiles)])


def _consume(number, spans, dk_ref, dv_ref, memory, rounds: Rounds, scale, consumer, n, done):
    """One consumer's tiles of a query block; carries what all consumers have had so far."""
    config, geometry, interpreted = rounds.config, rounds.geometry, rounds.interpreted
    place = locate(rounds, number, n)
    tiles_done, queries_done = done
    full = spans[place.spans, FULL]
    tiles = full + spans[place.spans, TAIL]
    level = LEVELS[rounds.level]
    to_log2 = scale * LOG2E
    shape = (ROWS, geometry.block_m)
    query_stage = lax.rem(queries_done, config.query_stages)
    queries, dout = memory.queries.at[query_stage], memory.dout.at[query_stage]
    # Tile `i` of the whole kernel is consumer `i % 2`'s.
    mine = lax.rem(tiles_done + consumer, CONSUMERS)

    def step(s, _, *, masked):
        t = mine + s * CONSUMERS
        tile = tiles_done + t
        stage = lax.rem(tile, config.tiles)

        def weights(logits):
            logits = logits * to_log2
            if not masked:
                return jnp.exp2(logits + _bias(rounds, shape))
            count, last = unpack_covers(memory.covers[stage])
            bias = jnp.where(count > 0, jnp.log2(count.astype(jnp.float32)), MASKED)
            logits = logits + lax.broadcast_in_dim(bias, shape, [0])
            if geometry.is_causal:
                limit = last - (place.query + geometry.offset)
                query = lax.broadcast_in_dim(lax.iota(jnp.int32, shape[1]), shape, [1])
                visible = lax.broadcast_in_dim(limit, shape, [0]) <= query
                logits = jnp.where(visible, logits, MASKED)
            return jnp.exp2(logits)

        def store(target, factor):
            def write(gradient):
                target[...] = (gradient * factor).astype(target.dtype)

            return write

        keys, values = memory.keys.at[stage], memory.values.at[stage]
        plgpu.barrier_wait(memory.tiles_full.at[stage])
        if masked:
            plgpu.barrier_wait(memory.covers_full.at[stage])
        products.tile_key_gradients(
            lax.broadcast_in_dim(memory.statistics[query_stage, 0] * (-1.0 / to_log2), shape, [1]),
            lax.broadcast_in_dim(-memory.statistics[query_stage, 1], shape, [1]),
            (keys, values, queries, dout),
            weights=weights,
            interpreted=interpreted,
            meanwhile=lambda: pl.when(tile >= CONSUMERS)(
                lambda: _hand_back(memory, rounds, tile - CONSUMERS)
            ),
            store_k=store(keys, scale / level),
            store_v=store(values, 1 / level),
        )
        plgpu.commit_smem()
        rows = pl.ds(pl.multiple_of(place.slot_row + t * ROWS, ROWS), ROWS)
        plgpu.copy_smem_to_gmem(keys, dk_ref.at[rows])
        plgpu.copy_smem_to_gmem(values, dv_ref.at[rows])

    @pl.when(tiles > 0)
    def _():
        plgpu.barrier_wait(memory.queries_full.at[query_stage])
        full_steps = lax.div(full - mine + CONSUMERS - 1, CONSUMERS)
        all_steps = lax.div(tiles - mine + CONSUMERS - 1, CONSUMERS)
        lax.fori_loop(0, full_steps, functools.partial(step, masked=False), None)
        lax.fori_loop(full_steps, all_steps, functools.partial(step, masked=True), None)
        products.release(memory.queries_empty.at[query_stage], interpreted=interpreted)

    return tiles_done + tiles, queries_done + (tiles > 0).astype(jnp.int32)


def _bias(rounds: Rounds, shape: tuple[int, int]):
    """log2 of the level, and `MASKED` on the unused rows of slots that blocks do not fill."""
    used, bias = rounds.geometry.rows[rounds.level], math.log2(LEVELS[rounds.level])
    if used == rounds.pitch:
        return bias
    inside = lax.iota(jnp.int32, ROWS) & (rounds.pitch - 1)
    return lax.broadcast_in_dim(jnp.where(inside < used, bias, MASKED), shape, [0])
