"""The kernel: the largest product of each row with each key block.

A thread block takes one tile of rows after the other, for each of them one tile of key blocks
after the other. Keys lie in memory by their place in the block: the product of the rows with
place `n` of 128 blocks is a `[64, 128]` accumulator whose elements belong to 128 different blocks,
and the maximum over a block is elementwise, from one place to the next. Nothing is exchanged
between threads until a row's own maximum, once for each tile of 128 blocks.

One producer warpgroup copies columns ahead of the consumers, each of which holds 64 rows.
"""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from psa_jax._mosaic import products
from psa_jax._mosaic.launch import launch, scratch
from psa_jax.kernels.scores.schedule import ROWS, Walk

WHOLE, SEEN = 0, 1
"""Columns of `Walk.spans`."""


@scratch
class Scratch:
    queries: Any
    keys: Any
    limits: Any
    factors: Any
    peaks: Any
    tops: Any
    queries_full: Any
    queries_empty: Any
    keys_full: Any
    keys_empty: Any
    factors_full: Any
    factors_empty: Any


def peaks_kernel(inputs: dict[str, Any], walk: Walk, *, interpret) -> tuple[jax.Array, jax.Array]:
    """Run the kernel.

    Args:
        inputs: by name:
            q: 16-bit `[heads, row_tiles * row_tile, D]`.
            k: 16-bit `[key heads * places, padded key blocks, D]`.
            factors: float32 `[key heads, padded key blocks]`, positive, on the products of a block.
            first_head: int32 `[1]`, the number of the first query head among all of them.
            spans: int32 `[row_tiles, 2]`, `walk.spans`.
            limits: int32 `[row_tiles * row_tile]`, `walk.limits`; only under a causal mask.
            offsets: int32 `[places]`, key position of each place in block 0; likewise.

    Returns:
        peaks float32 `[heads, row_tiles * row_tile, padded key blocks]`, for a block whose
        columns are all hidden -inf or, in tiles that no row of the row tile sees, undefined;
        tops float32 `[heads, row_tiles * row_tile]`, each row's largest peak.
    """
    _check(inputs, walk)
    config, q, k = walk.config, inputs["q"], inputs["k"]
    head_dim, dtype, columns = q.shape[-1], q.dtype, config.columns
    stages = config.query_stages * config.consumers
    causal = walk.limits is not None
    memory = Scratch(
        queries=products.operand((stages, ROWS, head_dim), dtype),
        keys=products.operand((config.stages, columns, head_dim), dtype),
        limits=plgpu.SMEM((stages, ROWS), jnp.int32) if causal else None,
        factors=plgpu.SMEM((2, columns), jnp.float32),
        peaks=products.operand((config.consumers, ROWS, columns), jnp.float32),
        tops=plgpu.SMEM((config.consumers, ROWS), jnp.float32),
        queries_full=plgpu.Barrier(num_arrivals=1 + causal, num_barriers=stages),
        queries_empty=plgpu.Barrier(num_barriers=stages),
        keys_full=plgpu.Barrier(num_barriers=config.stages),
        keys_empty=plgpu.Barrier(num_arrivals=config.consumers, num_barriers=config.stages),
        factors_full=plgpu.Barrier(num_barriers=2),
        factors_empty=plgpu.Barrier(num_arrivals=config.consumers, num_barriers=2),
    )
    shape = (*q.shape[:2], k.shape[1])

    def peaks(sources, peaks_ref, tops_ref, memory):
        _warpgroup(sources, peaks_ref, tops_ref, memory, walk=walk)

    return launch(
        peaks,
        inputs,
        out_type=(
            jax.ShapeDtypeStruct(shape, jnp.float32),
            jax.ShapeDtypeStruct(shape[:2], jnp.float32),
        ),
        scratch=memory,
        blocks=walk.blocks,
        warpgroups=config.consumers + 1,
        interpret=interpret,
    )


def _check(inputs: dict[str, Any], walk: Walk) -> None:
    """That the inputs are what `peaks_kernel` says: at trace time, so it costs nothing later."""
    rows, blocks = walk.row_tiles * walk.row_tile, walk.column_tiles * walk.config.columns
    kv_heads, head_dim = inputs["factors"].shape[0], inputs["q"].shape[-1]
    shapes = {
        "q": (walk.heads, rows, head_dim),
        "k": (kv_heads * walk.places, blocks, head_dim),
        "factors": (kv_heads, blocks),
        "first_head": (1,),
        "spans": (walk.row_tiles, 2),
        "limits": (rows,),
        "offsets": (walk.places,),
    }
    types = {"q": inputs["q"].dtype, "k": inputs["q"].dtype, "factors": jnp.float32}
    for name, x in inputs.items():
        chex.assert_shape(x, shapes[name])
        chex.assert_type(x, types.get(name, jnp.int32))


def _warpgroup(sources, peaks_ref, tops_ref, memory, *, walk: Walk):
    warpgroup = lax.axis_index("warpgroup")
    config = walk.config
    items = walk.items_of_block()

    @pl.when(warpgroup < config.consumers)
    def _():
        plgpu.set_max_registers(config.multiply_registers, action="increase")
        consume = functools.partial(_consume, sources, peaks_ref, tops_ref, memory, walk, warpgroup)
        lax.fori_loop(0, items, consume, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == config.consumers)
    def _():
        plgpu.set_max_registers(config.copy_registers, action="decrease")
        produce = functools.partial(_produce, sources, memory, walk)
        tiles = lax.fori_loop(0, items, produce, jnp.int32(0))
        for consumer in range(config.consumers):
            _drain(
                items,
                config.query_stages,
                memory.queries_empty,
                lambda n, consumer=consumer: _query_stage(walk, n, consumer),
            )
        _drain(tiles, 2, memory.factors_empty, lambda t: lax.rem(t, 2))
        products_done = tiles * walk.places
        _drain(
            products_done,
            config.stages,
            memory.keys_empty,
            lambda t: lax.rem(t, config.stages),
        )


def _query_stage(walk: Walk, n, consumer):
    return lax.rem(n, walk.config.query_stages) * walk.config.consumers + consumer


def _drain(uses, stages: int, empty, stage_of) -> None:
    """Wait until the consumers have released every buffer: no barrier may be left half way."""

    def wait(t, _):
        plgpu.barrier_wait(empty.at[stage_of(t)])

    lax.fori_loop(jnp.maximum(uses - stages, 0), uses, wait, None)


def _produce(sources, memory, walk: Walk, n, tiles):
    """Copy what one item needs.

    Args:
        tiles: tiles of columns copied before.

    Returns:
        The same count after this item.
    """
    config = walk.config
    head, row_tile = walk.locate(n)
    for consumer in range(config.consumers):
        stage = _query_stage(walk, n, consumer)
        pl.when(n >= config.query_stages)(
            lambda stage=stage: plgpu.barrier_wait(memory.queries_empty.at[stage])
        )
        rows = pl.ds(row_tile * walk.row_tile + consumer * ROWS, ROWS)
        full = memory.queries_full.at[stage]
        plgpu.copy_gmem_to_smem(sources["q"].at[head, rows], memory.queries.at[stage], full)
        if walk.limits is not None:
            plgpu.copy_gmem_to_smem(sources["limits"].at[rows], memory.limits.at[stage], full)
    key_head = lax.div(sources["first_head"][0] + head, walk.group)

    def one_tile(t, _):
        blocks = pl.ds(pl.multiple_of(t * config.columns, config.columns), config.columns)
        done = tiles + t
        side = lax.rem(done, 2)
        pl.when(done >= 2)(lambda: plgpu.barrier_wait(memory.factors_empty.at[side]))
        plgpu.copy_gmem_to_smem(
            sources["factors"].at[key_head, blocks],
            memory.factors.at[side],
            memory.factors_full.at[side],
        )

        def one_place(place, _):
            product = done * walk.places + place
            stage = lax.rem(product, config.stages)
            pl.when(product >= config.stages)(
                lambda: plgpu.barrier_wait(memory.keys_empty.at[stage])
            )
            plgpu.copy_gmem_to_smem(
                sources["k"].at[key_head * walk.places + place, blocks],
                memory.keys.at[stage],
                memory.keys_full.at[stage],
            )

        lax.fori_loop(0, walk.places, one_place, None)

    seen = sources["spans"][row_tile, SEEN]
    lax.fori_loop(0, seen, one_tile, None)
    return tiles + seen


def _consume(sources, peaks_ref, tops_ref, memory, walk: Walk, warpgroup, n, tiles):
    """One row tile of one consumer; returns the number of tiles of columns taken so far."""
    config = walk.config
    head, row_tile = walk.locate(n)
    rows = pl.ds(row_tile * walk.row_tile + warpgroup * ROWS, ROWS)
    query_stage = _query_stage(walk, n, warpgroup)
    queries = memory.queries.at[query_stage]
    shape = (ROWS, config.columns)
    plgpu.barrier_wait(memory.queries_full.at[query_stage])

    def one_tile(t, row_top, *, masked):
        done = tiles + t

        def stage_of(place):
            return lax.rem(done * walk.places + place, config.stages)

        def visible(logits, place):
            if not masked:
                return logits
            # Positions of a place ascend by `block_n` from block to block.
            nearest = t * (config.columns * walk.block_n) + sources["offsets"][place]
            reach = lax.broadcast_in_dim(memory.limits[query_stage] - nearest, shape, [0])
            at = lax.broadcast_in_dim(lax.iota(jnp.int32, config.columns), shape, [1])
            return jnp.where(at * walk.block_n <= reach, logits, -jnp.inf)

        def take(place, top, count):
            places = [place + i for i in range(count)]
            return products.largest(
                top,
                queries,
                [memory.keys.at[stage_of(p)] for p in places],
                seen=[functools.partial(visible, place=p) for p in places],
                full=[memory.keys_full.at[stage_of(p)] for p in places],
                empty=[memory.keys_empty.at[stage_of(p)] for p in places],
                interpreted=walk.interpreted,
            )

        width = 2 if config.pairs and walk.places > 1 else 1
        top = jnp.full(shape, -jnp.inf, jnp.float32)
        top = lax.fori_loop(
            0, walk.places // width, lambda p, top: take(p * width, top, width), top
        )
        if walk.places % width:
            top = take(walk.places - 1, top, 1)

        side = lax.rem(done, 2)
        plgpu.barrier_wait(memory.factors_full.at[side])
        top = top * lax.broadcast_in_dim(memory.factors[side], shape, [1])
        products.release(memory.factors_empty.at[side], interpreted=walk.interpreted)

        plgpu.wait_smem_to_gmem(0)  # the last tile's peaks have left their buffer
        memory.peaks[warpgroup] = top
        plgpu.commit_smem()
        blocks = pl.ds(pl.multiple_of(t * config.columns, config.columns), config.columns)
        plgpu.copy_smem_to_gmem(memory.peaks.at[warpgroup], peaks_ref.at[head, rows, blocks])
        return jnp.maximum(row_top, top.max(axis=1))

    whole, seen = (sources["spans"][row_tile, i] for i in (WHOLE, SEEN))
    row_top = jnp.full((ROWS,), -jnp.inf, jnp.float32)
    row_top = lax.fori_loop(0, whole, functools.partial(one_tile, masked=False), row_top)
    if walk.limits is not None:
        row_top = lax.fori_loop(whole, seen, functools.partial(one_tile, masked=True), row_top)
    products.release(memory.queries_empty.at[query_stage], interpreted=walk.interpreted)

    plgpu.wait_smem_to_gmem(0)
    memory.tops[warpgroup] = row_top
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(memory.tops.at[warpgroup], tops_ref.at[head, rows])
    return tiles + seen
