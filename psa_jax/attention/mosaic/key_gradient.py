"""The dk and dv kernel: every 64 pyramid rows have one writer, so results repeat bit for bit.

The two consumers of a thread block share a key tile and halve its queries; at the end they swap
one partial sum each, so that one writes dk and the other dv.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from psa_jax._mosaic import products
from psa_jax._mosaic.launch import launch, scratch
from psa_jax.attention.mosaic.configs import KeyConfig
from psa_jax.attention.mosaic.geometry import CONSUMERS, ROWS
from psa_jax.attention.mosaic.key_plan import (
    MASKED_VISITS,
    VISITS,
    KeyPlan,
    KeyTiles,
    unpack_row,
    visited_query,
)
from psa_jax.attention.mosaic.pyramid_rows import copy_rows
from psa_jax.attention.mosaic.query_plan import MASKED, read
from shared_specs.constants import LOG2E


@dataclasses.dataclass(frozen=True)
class KeyWalk:
    """Static facts of one run of the kernel."""

    tiles: KeyTiles
    config: KeyConfig
    heads: int
    kv_heads: int
    batch: int
    blocks: int
    interpreted: bool

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def split_blocks(self) -> bool:
        """Whether a query block of 128 rows is halved; else query blocks are taken in turn."""
        return self.tiles.geometry.block_m == CONSUMERS * ROWS

    def items_of_block(self) -> jax.Array:
        items = self.batch * self.kv_heads * self.tiles.total
        return lax.div(items - lax.axis_index("block") + self.blocks - 1, self.blocks)

    def locate(self, n: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Key/value head and tile of this thread block's `n`-th item."""
        item = lax.axis_index("block") + n * self.blocks
        # The coarsest level first: its tiles have the most visits.
        tile = self.tiles.total - 1 - lax.rem(item, self.tiles.total)
        return lax.div(item, self.tiles.total), tile

    def steps(self, visits: jax.Array, consumer: jax.Array | int) -> jax.Array:
        """How many 64-row query tiles a consumer takes from the first `visits` visits."""
        if self.split_blocks:
            return visits
        return lax.div(visits - consumer + CONSUMERS - 1, CONSUMERS)

    def visit_index(self, step: jax.Array, consumer: jax.Array | int) -> jax.Array:
        return step if self.split_blocks else step * CONSUMERS + consumer

    def queries(self, visit: jax.Array, consumer: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        """A consumer's share of a visit: query head of the group, first query row."""
        geometry = self.tiles.geometry
        query = visited_query(visit)
        first = lax.rem(query, geometry.padded_q_blocks) * geometry.block_m
        if self.split_blocks:
            first = first + consumer * ROWS
        return lax.div(query, geometry.padded_q_blocks), first

    def stage(self, step: jax.Array, consumer: jax.Array | int) -> jax.Array:
        """Stage of a consumer's `step`-th query tile, counted from the start of the kernel."""
        return lax.rem(step, self.config.stages) + consumer * self.config.stages


@scratch
class Scratch:
    keys: Any
    values: Any
    rows: Any
    keys_full: Any
    keys_empty: Any
    queries: Any
    dout: Any
    statistics: Any
    queries_full: Any
    queries_empty: Any
    partial: Any
    given: Any


def key_gradient_kernel(
    q, k, v, dout, statistics, plan: KeyPlan, walk: KeyWalk, *, scale, interpret
):
    """Run the kernel.

    Args:
        q, dout, k, v, statistics, scale: as for the dq kernel.

    Returns:
        dk, dv: float32 `[B * Hk, tiles * 64, D]`, gradients of the pyramid's rows, tile by tile.
    """
    head_dim, dtype = q.shape[-1], q.dtype
    stages = CONSUMERS * walk.config.stages
    queries = products.operand((stages, ROWS, head_dim), dtype)
    keys = products.operand((ROWS, head_dim), dtype)
    memory = Scratch(
        keys=keys,
        values=keys,
        rows=plgpu.SMEM((ROWS,), jnp.int32),
        keys_full=plgpu.Barrier(num_arrivals=3),
        keys_empty=plgpu.Barrier(num_arrivals=CONSUMERS),
        queries=queries,
        dout=queries,
        statistics=plgpu.SMEM((stages, 2, ROWS), jnp.float32),
        queries_full=plgpu.Barrier(num_arrivals=3, num_barriers=stages),
        queries_empty=plgpu.Barrier(num_barriers=stages),
        partial=products.operand((ROWS, head_dim), jnp.float32),
        given=plgpu.Barrier(num_barriers=2),
    )
    heads = walk.batch * walk.kv_heads
    rows = jax.ShapeDtypeStruct((heads, walk.tiles.total * ROWS, head_dim), jnp.float32)

    def key_gradient(inputs, dk_ref, dv_ref, memory):
        _warpgroup(*inputs, dk_ref, dv_ref, memory, walk=walk, scale=scale)

    return launch(
        key_gradient,
        ((q, dout, statistics), k, v, plan),
        out_type=(rows, rows),
        scratch=memory,
        blocks=walk.blocks,
        warpgroups=CONSUMERS + 1,
        rereads=True,
        interpret=interpret,
    )


def _warpgroup(row_refs, k, v, plan, dk_ref, dv_ref, memory, *, walk, scale):
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < CONSUMERS)
    def _():
        plgpu.set_max_registers(walk.config.multiply_registers, action="increase")
        consumer = functools.partial(_consume, plan, dk_ref, dv_ref, memory, walk, scale, warpgroup)
        lax.fori_loop(0, walk.items_of_block(), consumer, jnp.int32(0))

    @pl.when(warpgroup == CONSUMERS)
    def _():
        plgpu.set_max_registers(walk.config.copy_registers, action="decrease")
        producer = functools.partial(_produce, row_refs, k, v, plan, memory, walk)
        items = walk.items_of_block()
        done = lax.fori_loop(0, items, producer, (jnp.int32(0),) * CONSUMERS)
        pl.when(items > 0)(lambda: plgpu.barrier_wait(memory.keys_empty))
        for consumer in range(CONSUMERS):

            def wait(step, _, consumer=consumer):
                plgpu.barrier_wait(memory.queries_empty.at[walk.stage(step, consumer)])

            steps = done[consumer]
            lax.fori_loop(jnp.maximum(steps - walk.config.stages, 0), steps, wait, None)


def _produce(row_refs, k, v, plan, memory, walk, n, done):
    """Copy one key tile and all its query tiles; carries the query tiles copied per consumer."""
    q_ref, dout_ref, statistics_ref = row_refs
    kv_head, tile = walk.locate(n)
    pl.when(n > 0)(lambda: plgpu.barrier_wait(memory.keys_empty))
    start, geometry = plan.starts[tile], walk.tiles.geometry
    for source, target in ((k, memory.keys), (v, memory.values)):
        copy_rows(source, kv_head, start, ROWS, target, memory.keys_full, geometry=geometry)
    plgpu.copy_gmem_to_smem(plan.rows.at[tile], memory.rows, memory.keys_full)

    row = kv_head * walk.tiles.total + tile
    steps = [walk.steps(read(plan.counts, row, VISITS), c) for c in range(CONSUMERS)]

    def copy_step(step, _):
        for consumer in range(CONSUMERS):

            @pl.when(step < steps[consumer])
            def _(consumer=consumer):
                visit = plan.visits[row, walk.visit_index(step, consumer)]
                member, first = walk.queries(visit, consumer)
                stage = walk.stage(done[consumer] + step, consumer)
                pl.when(done[consumer] + step >= walk.config.stages)(
                    lambda: plgpu.barrier_wait(memory.queries_empty.at[stage])
                )
                rows = pl.ds(pl.multiple_of(first, ROWS), ROWS)
                head = kv_head * walk.group + member
                for source, target in (
                    (q_ref.at[head, rows], memory.queries),
                    (dout_ref.at[head, rows], memory.dout),
                    (statistics_ref.at[head, :, rows], memory.statistics),
                ):
                    plgpu.copy_gmem_to_smem(source, target.at[stage], memory.queries_full.at[stage])

    lax.fori_loop(0, steps[0], copy_step, None)
    return tuple(before + new for before, new in zip(done, steps, strict=True))


def _consume(plan, dk_ref, dv_ref, memory, walk, scale, consumer, n, done):
    """One key tile's share of one consumer; returns the query tiles it has taken so far."""
    interpreted, geometry = walk.interpreted, walk.tiles.geometry
    kv_head, tile = walk.locate(n)
    head_dim = memory.keys.shape[-1]
    to_log2 = scale * LOG2E
    plgpu.barrier_wait(memory.keys_full)

    def step(s, carry, *, masked):
        visit = plan.visits[row, walk.visit_index(s, consumer)]
        stage = walk.stage(done + s, consumer)
        plgpu.barrier_wait(memory.queries_full.at[stage])
        # Read again in every step: the registers are all taken.
        count, block, last = unpack_row(memory.rows[...])
        visited = lax.shift_right_logical(lax.broadcast_in_dim(visit, (ROWS,), ()), block) & 1
        bias = jnp.log2(count.astype(jnp.float32))
        bias = jnp.where((visited == 1) & (count > 0), bias, MASKED)

        def weights(logits):
            logits = logits * to_log2 + lax.broadcast_in_dim(bias, logits.shape, [0])
            if masked:
                _, first = walk.queries(visit, consumer)
                limit = lax.broadcast_in_dim(last - (first + geometry.offset), logits.shape, [0])
                query = lax.broadcast_in_dim(lax.iota(jnp.int32, ROWS), logits.shape, [1])
                logits = jnp.where(limit <= query, logits, MASKED)
            return jnp.exp2(logits)

        shape = (ROWS, ROWS)
        carry = products.key_gradients(
            *carry,
            lax.broadcast_in_dim(memory.statistics[stage, 0] * (-1.0 / to_log2), shape, [1]),
            lax.broadcast_in_dim(-memory.statistics[stage, 1], shape, [1]),
            (memory.keys, memory.values, memory.queries.at[stage], memory.dout.at[stage]),
            weights=weights,
            interpreted=interpreted,
        )
        products.release(memory.queries_empty.at[stage], interpreted=interpreted)
        return carry

    row = kv_head * walk.tiles.total + tile
    steps = walk.steps(read(plan.counts, row, VISITS), consumer)
    gradients = (jnp.zeros((ROWS, head_dim), jnp.float32),) * 2
    masked = 0
    if geometry.is_causal:
        masked = walk.steps(read(plan.counts, row, MASKED_VISITS), consumer)
        gradients = lax.fori_loop(0, masked, functools.partial(step, masked=True), gradients)
    dk, dv = lax.fori_loop(masked, steps, functools.partial(step, masked=False), gradients)
    products.release(memory.keys_empty, interpreted=interpreted)

    rows = pl.ds(tile * ROWS, ROWS)

    @pl.when(consumer == 0)
    def _():
        plgpu.barrier_wait(memory.given.at[0])
        dk_ref.at[kv_head, rows][...] = (dk + memory.partial[...]) * scale
        memory.partial[...] = dv
        plgpu.barrier_arrive(memory.given.at[1])

    @pl.when(consumer == 1)
    def _():
        memory.partial[...] = dk
        plgpu.barrier_arrive(memory.given.at[0])
        plgpu.barrier_wait(memory.given.at[1])
        dv_ref.at[kv_head, rows][...] = dv + memory.partial[...]

    return done + steps
