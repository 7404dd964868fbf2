"""The dq kernel: the forward's walk once more, with the weights recomputed from lse."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from psa_jax._mosaic import products
from psa_jax._mosaic.launch import launch, scratch
from psa_jax.attention.mosaic.forward_kernel import masked_logits
from psa_jax.attention.mosaic.geometry import CONSUMERS, ROWS
from psa_jax.attention.mosaic.query_plan import ENDS, HALF, TAIL, QueryPlan, read
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
    dout: Any
    statistics: Any
    output: Any
    full: Any
    empty: Any


def query_gradient_kernel(
    q, k, v, dout, statistics, plan: QueryPlan, walk: Walk, *, scale, interpret
):
    """Run the kernel.

    Args:
        q, dout: `[B * H, Lq, D]`; in the interpreter `Lq` is a whole number of query tiles.
        k, v: `PyramidRows`.
        statistics: float32 `[B * H, 2, padded_queries]`: lse in base 2, `-MASKED` on rows without
            keys; and what to take from the gradient of each weight of the row.
        scale: factor on q.k, not negative.

    Returns:
        dq like `q`.
    """
    head_dim, dtype = q.shape[-1], q.dtype
    stages = walk.config.query_stages * CONSUMERS
    rows = products.operand((stages, ROWS, head_dim), dtype)
    memory = Scratch(
        tiles=tile_memory(walk, head_dim, dtype),
        queries=rows,
        dout=rows,
        statistics=plgpu.SMEM((stages, 2, ROWS), jnp.float32),
        output=products.operand((CONSUMERS, ROWS, head_dim), dtype),
        full=plgpu.Barrier(num_arrivals=3, num_barriers=stages),
        empty=plgpu.Barrier(num_barriers=stages),
    )

    def query_gradient(inputs, out_ref, memory):
        _warpgroup(*inputs, out_ref, memory, walk=walk, scale=scale)

    return launch(
        query_gradient,
        ((q, dout, statistics), k, v, plan),
        out_type=jax.ShapeDtypeStruct(q.shape, dtype),
        scratch=memory,
        blocks=walk.blocks,
        warpgroups=CONSUMERS + walk.streams,
        interpret=interpret,
    )


def _warpgroup(row_refs, k, v, plan, out_ref, memory, *, walk: Walk, scale):
    warpgroup = lax.axis_index("warpgroup")
    tiles = memory.tiles
    config = walk.config
    items = walk.items_of_block()

    @pl.when(warpgroup < CONSUMERS)
    def _():
        plgpu.set_max_registers(config.multiply_registers, action="increase")
        consumer = functools.partial(_consume, plan, out_ref, memory, tiles, walk, scale, warpgroup)
        lax.fori_loop(0, items, consumer, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup >= CONSUMERS)
    def _():
        plgpu.set_max_registers(config.copy_registers, action="decrease")
        stream = 0 if walk.shared else warpgroup - CONSUMERS
        consumers = range(CONSUMERS) if walk.shared else (stream,)
        q_ref, dout_ref, statistics_ref = row_refs

        def produce(n, tiles_done):
            place = walk.locate(n, stream)
            for consumer in consumers:
                stage = walk.query_stage(n, consumer)
                pl.when(n >= config.query_stages)(
                    lambda stage=stage: plgpu.barrier_wait(memory.empty.at[stage])
                )
                rows = pl.ds(place.first_query + consumer * ROWS, ROWS)
                for source, target in (
                    (q_ref.at[place.head, rows], memory.queries),
                    (dout_ref.at[place.head, rows], memory.dout),
                    (statistics_ref.at[place.head, :, rows], memory.statistics),
                ):
                    plgpu.copy_gmem_to_smem(source, target.at[stage], memory.full.at[stage])
            return copy_row(walk, place, tiles_done, stream, k, v, plan, tiles)

        tiles_done = lax.fori_loop(0, items, produce, jnp.int32(0))
        drain(walk, tiles_done, stream, tiles)
        for consumer in consumers:
            walk.drain_queries(items, consumer, memory.empty)


def _consume(plan, out_ref, memory, tiles, walk, scale, warpgroup, n, first_tile):
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
    queries, dout = memory.queries.at[query_stage], memory.dout.at[query_stage]
    head_dim, dtype = queries.shape[-1], queries.dtype
    to_log2 = scale * LOG2E

    plgpu.barrier_wait(memory.full.at[query_stage])
    lse2, delta = (memory.statistics[query_stage, i] for i in range(2))

    def step(t, acc, *, masked):
        stage = walk.stage(first_tile + t, stream)

        def weights(logits):
            if masked:
                logits = masked_logits(logits * to_log2, tiles, stage, geometry, first_query)
                return jnp.exp2(logits - lax.broadcast_in_dim(lse2, logits.shape, [0]))
            shift = lse2 - level_of_tile(t, ends).astype(jnp.float32)
            return jnp.exp2(logits * to_log2 - lax.broadcast_in_dim(shift, logits.shape, [0]))

        plgpu.barrier_wait(tiles.keys_full.at[stage])
        plgpu.barrier_wait(tiles.values_full.at[stage])
        if masked:
            plgpu.barrier_wait(tiles.covers_full.at[stage])
        acc = products.query_gradient(
            acc,
            lax.broadcast_in_dim(-delta, (ROWS, geometry.tile), [0]),
            (queries, dout, tiles.keys.at[stage], tiles.values.at[stage]),
            weights=weights,
            interpreted=interpreted,
            values_read=lambda: products.release(
                tiles.values_empty.at[stage], interpreted=interpreted
            ),
        )
        products.release(tiles.keys_empty.at[stage], interpreted=interpreted)
        return acc

    acc = jnp.zeros((ROWS, head_dim), jnp.float32)
    acc = lax.fori_loop(0, full_tiles, functools.partial(step, masked=False), acc)
    acc = lax.fori_loop(full_tiles, all_tiles, functools.partial(step, masked=True), acc)
    products.release(memory.empty.at[query_stage], interpreted=interpreted)

    plgpu.wait_smem_to_gmem(0)  # the last item's output has left its buffer
    memory.output[warpgroup] = (acc * scale).astype(dtype)
    plgpu.commit_smem()
    rows = pl.ds(first_query, ROWS)
    plgpu.copy_smem_to_gmem(memory.output.at[warpgroup], out_ref.at[place.head, rows])
    return first_tile + all_tiles
