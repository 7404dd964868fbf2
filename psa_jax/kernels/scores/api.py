"""Block scores from q and k: samples, the kernel's block maxima, and their ratios by XLA.

Counts at 32,768 tokens, 24 heads, D = 128, `importance_pool` 4 (8,192 rows, as many columns, 512
key blocks), for what is a kernel and what is left to XLA:

    product        0.41 TFLOP. XLA writes logits to memory: 6.4 GB, written and read again. The
                   kernel keeps them in registers and writes one number per block.
    block maxima   0.40 GB written and 0.40 GB read by XLA: 0.19 ms at 4.3 TB/s. Row maxima come
                   out of the kernel (0.8 MB), so XLA reads block maxima once: difference, maximum
                   over the rows of a query block and exponential are one elementwise pass. At
                   69,120 tokens 1.8 GB: made for a few heads at a time, `most_bytes` at once.
    columns        0.05 GB from memory, 3.2 GB from L2 by tiles of 128 rows
    means          q and k: 0.40 GB read twice, once for the scale of a block; 0.10 GB written
    scores         13 MB written
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from psa_jax._mosaic.channels import pad_channels
from psa_jax._mosaic.device import multiprocessors
from psa_jax._switches import of_32_bits
from psa_jax._vmap import vmap_as_batch
from psa_jax.kernels.scores.peaks import peaks_kernel
from psa_jax.kernels.scores.samples import samples
from psa_jax.kernels.scores.schedule import ROWS, Walk
from psa_jax.kernels.scores.tiles import PeakConfig, default_config
from shared_specs.config import PSAConfig
from shared_specs.constants import LOG2E
from shared_specs.geometry import cdiv

_LEAST_FACTOR = float(np.finfo(np.float32).tiny)
"""Smallest factor on a difference of logits: 0 would turn a hidden block's -inf into NaN."""
_EVERYTHING = 1 << 30
"""Limit of rows that see every key: past any position, far from overflow."""


@of_32_bits
def peak_scores(
    q: Array, k: Array, *, config: PSAConfig, sizes: PeakConfig | None = None, interpret=None
) -> Array:
    """Scores `pooled` or `sampled` (specification, section 5).

    Args:
        q: `[B, H, Lq, D]`, float16 or bfloat16, D up to 128.
        k: `[B, Hk, Lk, D]`, same dtype.
        config: block sizes, estimator and its parameters, `causal`, `scale`.
        sizes: sizes of the kernel instead of those of `default_config`.
        interpret: parameters of Pallas' interpreter, or None for the GPU.

    Returns:
        float32 `[B, H, Nq, Nk]`, at least 0; 0 where no row sees a column.
    """
    run = functools.partial(_peak_scores, config=config, sizes=sizes, interpret=interpret)
    return vmap_as_batch(lambda q, k: (run(q, k),))(q, k)[0]


@functools.partial(jax.jit, static_argnames=("config", "sizes", "interpret"))
def _peak_scores(q: Array, k: Array, *, config: PSAConfig, sizes: PeakConfig | None, interpret):
    scale = config.resolved_scale(q.shape[-1])
    q, k = pad_channels(q), pad_channels(k)
    (batch, heads, q_len, dim), (_, key_heads, kv_len, _) = q.shape, k.shape
    query_blocks, key_blocks = cdiv(q_len, config.block_m), cdiv(kv_len, config.block_n)
    sizes = sizes or default_config(dim, key_blocks, config.causal)
    rows = samples(q * math.copysign(1.0, scale), config, keys=False)
    columns = samples(k, config, keys=True, multiple=sizes.columns)
    walk = _walk(q, k, config, sizes, rows, columns, interpreted=interpret is not None)
    count, padded_rows = rows.values.shape[3], walk.row_tiles * walk.row_tile

    by_head = rows.values.reshape(batch * heads, query_blocks * count, dim)
    missing = padded_rows - by_head.shape[1]
    by_head = jnp.pad(by_head, [(0, 0), (0, missing), (0, 0)], mode="edge")
    inputs = {
        "k": _by_place(columns.values),
        "factors": columns.scale.reshape(batch * key_heads, -1),
        "spans": jnp.asarray(walk.spans),
    }
    if walk.limits is not None:
        inputs["limits"] = jnp.asarray(walk.limits)
        inputs["offsets"] = jnp.asarray(walk.first[0], jnp.int32)
    factors = abs(scale) * LOG2E * rows.scale.reshape(batch * heads, query_blocks)
    factors = jnp.maximum(factors, _LEAST_FACTOR)
    # Key blocks of each row that the kernel wrote.
    written = np.repeat(walk.spans[:, 1] * sizes.columns, walk.row_tile)[: query_blocks * count]

    def some_heads(chunk):
        first_head, q, factors = chunk
        peaks, tops = peaks_kernel(
            {**inputs, "q": q, "first_head": first_head}, walk, interpret=interpret
        )
        split = (walk.heads, query_blocks, count)
        tops = jnp.where(jnp.isneginf(tops), 0, tops)[:, : query_blocks * count]
        peaks = peaks[:, : query_blocks * count, :key_blocks].reshape(*split, key_blocks)
        below = peaks - tops.reshape(*split, 1)
        if walk.limits is not None:
            there = np.arange(key_blocks) < written.reshape(query_blocks, count, 1)
            below = jnp.where(there, below, -jnp.inf)
        return jnp.exp2(below.max(2) * factors[..., None])

    chunks = batch * heads // walk.heads
    split = (jnp.arange(chunks, dtype=jnp.int32) * walk.heads, by_head, factors)
    split = tuple(x.reshape(chunks, -1, *x.shape[1:]) for x in split)
    if chunks == 1:
        scores = some_heads(tuple(x[0] for x in split))
    else:
        scores = lax.map(some_heads, split)
    return scores.reshape(batch, heads, query_blocks, key_blocks)


def _by_place(values: Array) -> Array:
    """`[B, Hk, blocks, places, D]` as `[B * Hk * places, blocks, D]`."""
    return jnp.swapaxes(values, 2, 3).reshape(-1, values.shape[2], values.shape[4])


def _walk(q, k, config: PSAConfig, sizes: PeakConfig, rows, columns, *, interpreted) -> Walk:
    heads = q.shape[0] * q.shape[1]
    row_tiles = cdiv(rows.last.size, sizes.consumers * ROWS)
    padded_rows = row_tiles * sizes.consumers * ROWS
    key_blocks, places = columns.first.shape
    launches = cdiv(heads * padded_rows * key_blocks * 4, sizes.most_bytes)
    launches = next(n for n in range(min(launches, heads), heads + 1) if heads % n == 0)
    limits = None
    if config.causal:
        limits = rows.last.ravel() + (k.shape[2] - q.shape[2])
        limits = np.where(limits >= columns.first.max(), _EVERYTHING, limits)
        limits = np.pad(limits, (0, padded_rows - limits.size), mode="edge").astype(np.int32)
    return Walk(
        config=sizes,
        heads=heads // launches,
        group=q.shape[1] // k.shape[1],
        places=places,
        block_n=config.block_n,
        row_tiles=row_tiles,
        column_tiles=key_blocks // sizes.columns,
        blocks=min(sizes.blocks or multiprocessors(), heads // launches * row_tiles),
        limits=limits,
        first=columns.first,
        interpreted=interpreted,
    )
