"""The forward kernel: one online softmax over the tiles of a table row."""

from __future__ import annotations

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
from psa_jax.attention.mosaic.geometry import CONSUMERS, ROWS
from psa_jax.attention.mosaic.query_plan import (
    ENDS,
    HALF,
    MASKED,
    TAIL,
    QueryPlan,
    read,
    unpack_covers,
)
from psa_jax.attention.mosaic.walk import (
    Tiles,
    Walk,
    copy_row,
    drain,
    level_of_tile,
    tile_memory,
)
from shared_specs.constants import LOG2E


@scratch
class Scratch:
    tiles: Tiles
    queries: Any
    output: Any
    lse: Any
    queries_full: Any
    queries_empty: Any
    turn: Any


def forward_kernel(q, k, v, plan: QueryPlan, walk: Walk, *, scale: float, interpret):
    """Run the kernel.

    Args:
        q: `[B * H, Lq, D]`; in the interpreter `Lq` is a whole number of query tiles.
        k, v: `PyramidRows`.
        scale: factor on q.k, not negative.

    Returns:
        out like `q`, and lse float32 `[B * H, padded_queries]`.
    """
    head_dim, dtype = q.shape[-1], q.dtype
    stages = walk.config.query_stages * CONSUMERS
    memory = Scratch(
        tiles=tile_memory(walk, head_dim, dtype),
        queries=products.operand((stages, ROWS, head_dim), dtype),
        output=products.operand((CONSUMERS, ROWS, head_dim), dtype),
        lse=plgpu.SMEM((CONSUMERS, ROWS), jnp.float32),
        queries_full=plgpu.Barrier(num_barriers=stages),
        queries_empty=plgpu.Barrier(num_barriers=stages),
        turn=plgpu.Barrier(num_arrivals=CONSUMERS),
    )
    lse = jax.ShapeDtypeStruct((q.shape[0], walk.geometry.padded_queries), jnp.float32)

    def forward(inputs, out_ref, lse_ref, memory):
        _warpgroup(*inputs, out_ref, lse_ref, memory, walk=walk, scale=scale)

    return launch(
        forward,
        (q, k, v, plan),
        out_type=(jax.ShapeDtypeStruct(q.shape, dtype), lse),
        scratch=memory,
        blocks=walk.blocks,
        warpgroups=CONSUMERS + walk.streams,
        interpret=interpret,
    )


def _warpgroup(q_ref, k, v, plan, out_ref, lse_ref, memory, *, walk: Walk, scale):
    warpgroup = lax.axis_index("warpgroup")
    tiles = memory.tiles
    config = walk.config

    @pl.when(warpgroup < CONSUMERS)
    def _():
        plgpu.set_max_registers(config.multiply_registers, action="increase")
        consumer = functools.partial(
            _consume, plan, out_ref, lse_ref, memory, tiles, walk, scale, warpgroup
        )
        if config.ping_pong:
            pl.when(warpgroup == 1)(functools.partial(_take_turn, memory.turn))
        lax.fori_loop(0, walk.items_of_block(), consumer, jnp.int32(0))
        if config.ping_pong:
            pl.when(warpgroup == 0)(functools.partial(_take_turn, memory.turn))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup >= CONSUMERS)
    def _():
        plgpu.set_max_registers(config.copy_registers, action="decrease")
        stream = 0 if walk.shared else warpgroup - CONSUMERS
        consumers = range(CONSUMERS) if walk.shared else (stream,)

        def produce(n, tiles_done):
            place = walk.locate(n, stream)
            for consumer in consumers:
                stage = walk.query_stage(n, consumer)
                pl.when(n >= config.query_stages)(
                    lambda stage=stage: plgpu.barrier_wait(memory.queries_empty.at[stage])
                )
                rows = pl.ds(place.first_query + consumer * ROWS, ROWS)
                plgpu.copy_gmem_to_smem(
                    q_ref.at[place.head, rows],
                    memory.queries.at[stage],
                    memory.queries_full.at[stage],
                )
            return copy_row(walk, place, tiles_done, stream, k, v, plan, tiles)

        items = walk.items_of_block()
        tiles_done = lax.fori_loop(0, items, produce, jnp.int32(0))
        drain(walk, tiles_done, stream, tiles)
        for consumer in consumers:
            walk.drain_queries(items, consumer, memory.queries_empty)


def _take_turn(turn) -> None:
    plgpu.barrier_arrive(turn)
    plgpu.barrier_wait(turn)


def _consume(plan, out_ref, lse_ref, memory, tiles, walk, scale, warpgroup, n, first_tile):
    """One query tile of one consumer; returns the number of tiles taken so far."""
    geometry, interpreted = walk.geometry, walk.interpreted
    stream = 0 if walk.shared else warpgroup
    place = walk.locate(n, stream)
    first_query = place.first_query + warpgroup * ROWS
    spans = [read(plan.spans, place.row, i) for i in range(TAIL + 1)]
    ends = spans[ENDS]
    full_tiles = ends[-1]
    all_tiles = full_tiles + spans[HALF] + spans[TAIL]

    query_stage = walk.query_stage(n, warpgroup)
    queries = memory.queries.at[query_stage]
    head_dim, dtype = queries.shape[-1], queries.dtype
    to_log2 = scale * LOG2E
    turn = functools.partial(_take_turn, memory.turn) if walk.config.ping_pong else lambda: None

    plgpu.barrier_wait(memory.queries_full.at[query_stage])

    def wait_for_keys(t):
        @pl.when(t < all_tiles)
        def _():
            plgpu.barrier_wait(tiles.keys_full.at[walk.stage(first_tile + t, stream)])

    def step(t, carry, *, masked):
        acc, top, total = carry
        stage = walk.stage(first_tile + t, stream)
        logits = products.rows_times_rows(
            queries, tiles.keys.at[stage], interpreted=interpreted, meanwhile=turn
        )
        products.release(tiles.keys_empty.at[stage], interpreted=interpreted)
        if masked:
            plgpu.barrier_wait(tiles.covers_full.at[stage])
            logits = masked_logits(logits * to_log2, tiles, stage, geometry, first_query)
            new_top = jnp.maximum(top, logits.max(axis=1))
            weights = jnp.exp2(logits - lax.broadcast_in_dim(new_top, logits.shape, [0]))
        else:
            bias = level_of_tile(t, ends).astype(jnp.float32)
            new_top = jnp.maximum(top, logits.max(axis=1) * to_log2 + bias)
            shift = lax.broadcast_in_dim(new_top - bias, logits.shape, [0])
            weights = jnp.exp2(logits * to_log2 - shift)
        rescale = jnp.exp2(top - new_top)
        acc = acc * lax.broadcast_in_dim(rescale, acc.shape, [0])
        total = total * rescale + weights.sum(axis=1)
        narrow = weights.astype(dtype)
        acc, total, new_top, narrow = lax.optimization_barrier((acc, total, new_top, narrow))
        if walk.config.ping_pong:
            plgpu.barrier_arrive(memory.turn)
        plgpu.barrier_wait(tiles.values_full.at[stage])
        if walk.config.ping_pong:
            plgpu.barrier_wait(memory.turn)
        acc = products.accumulate(
            acc,
            narrow,
            tiles.values.at[stage],
            interpreted=interpreted,
            meanwhile=lambda: wait_for_keys(t + 1),
        )
        products.release(tiles.values_empty.at[stage], interpreted=interpreted)
        return acc, new_top, total

    # The other warpgroup may still be in its last step, where it needs two turns to go on; the
    # next queries, and with them the next tile to take turns at, wait for it.
    @pl.when(all_tiles == 0)
    def _():
        turn()
        turn()

    wait_for_keys(0)
    carry = (
        jnp.zeros((ROWS, head_dim), jnp.float32),
        jnp.full((ROWS,), MASKED, jnp.float32),
        jnp.zeros((ROWS,), jnp.float32),
    )
    carry = lax.fori_loop(0, full_tiles, functools.partial(step, masked=False), carry)
    carry = lax.fori_loop(full_tiles, all_tiles, functools.partial(step, masked=True), carry)
    acc, top, total = carry
    products.release(memory.queries_empty.at[query_stage], interpreted=interpreted)

    # A row that saw only masked tokens has a sum too: of exp2(MASKED - MASKED).
    sees = top > MASKED / 2
    inverse = jnp.where(sees, 1.0 / jnp.where(sees, total, 1.0), 0.0)
    lse = jnp.where(sees, top * math.log(2.0) + jnp.log(jnp.where(sees, total, 1.0)), -jnp.inf)
    plgpu.wait_smem_to_gmem(0)  # the last item's output has left its buffer
    memory.output[warpgroup] = (acc * lax.broadcast_in_dim(inverse, acc.shape, [0])).astype(dtype)
    memory.lse[warpgroup] = lse
    plgpu.commit_smem()
    rows = pl.ds(first_query, ROWS)
    plgpu.copy_smem_to_gmem(memory.output.at[warpgroup], out_ref.at[place.head, rows])
    plgpu.copy_smem_to_gmem(memory.lse.at[warpgroup], lse_ref.at[place.head, rows])
    return first_tile + all_tiles


def masked_logits(logits, tiles, stage, geometry, first_query):
    """Logits in log2 with the tile's bias, hidden ones pushed down to `MASKED`."""
    count, last = unpack_covers(tiles.covers[stage])
    bias = jnp.where(count > 0, jnp.log2(count.astype(jnp.float32)), MASKED)
    logits += lax.broadcast_in_dim(bias, logits.shape, [1])
    if not geometry.is_causal:
        return logits
    limit = lax.broadcast_in_dim(last - (first_query + geometry.offset), logits.shape, [1])
    query = lax.broadcast_in_dim(lax.iota(jnp.int32, ROWS), logits.shape, [0])
    return jnp.where(limit <= query, logits, MASKED)
