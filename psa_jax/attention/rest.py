"""What level 0 adds with `rest="mean"` (specification, section 4), to any implementation.

The softmax of a row runs over what its levels list and over one mean a block for the rest. An
implementation knows the list only, so the two parts are joined here by their log-sum-exps; its
backward pass, given the joined out and lse, then yields exactly what the list owes, and what the
means owe is added. One pass over `[Lq, Nk]` means, `1 / block_n` of dense attention, and no table.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from psa_jax.attention.gather.heads import filled_like
from psa_jax.attention.gather.products import product
from psa_jax.attention.gather.tangent import Moved
from psa_jax.pyramid import accumulator, group_counts, group_means, split_tokens
from shared_specs.geometry import Geometry, cdiv

_ELEMENTS = 1 << 26
"""Logits that stand in memory at once."""


@dataclasses.dataclass(frozen=True)
class _Sizes(Geometry):
    batch: int
    heads: int
    kv_heads: int
    scale: float

    @property
    def at_once(self) -> int:
        """Query blocks of a chunk."""
        elements = self.batch * self.heads * self.k_blocks * self.block_m
        return min(self.q_blocks, max(1, _ELEMENTS // elements))

    @property
    def chunks(self) -> int:
        return cdiv(self.q_blocks, self.at_once)


class _Means(NamedTuple):
    """Means `[B, Hk, Nk, D]` in the input dtype."""

    k: Array
    v: Array


class _Chunk(NamedTuple):
    """Some query blocks of all heads, `[B, Hk, H // Hk, rows, ...]`, and their levels."""

    q: Array
    levels: Array
    position: Array
    lse: Array


def add_means(
    q: Array, k: Array, v: Array, levels: Array, out: Array, lse: Array, **call
) -> tuple[Array, Array]:
    """out and lse of the list, joined by the means of the blocks at level 0.

    Args:
        q: `[B, H, Lq, D]`; k, v: `[B, Hk, Lk, D]`.
        levels: dense int32 `[B, H, Nq, Nk]`.
        out, lse: `[B, H, Lq, D]` and `[B, H, Lq]`, of what `levels` lists.
        **call: block_m, block_n, scale and is_causal.
    """
    sizes = _sizes(q, k, call)
    means = _means(k, v, sizes)

    def join(chunk: _Chunk, out):
        logits = _logits(chunk, means, sizes)
        joined = jnp.logaddexp(chunk.lse, jax.nn.logsumexp(logits, -1))
        origin = jnp.where(joined == -jnp.inf, 0, joined)[..., None]
        weights = jnp.exp(logits - origin).astype(v.dtype)
        of_list = out.astype(joined.dtype) * jnp.exp(chunk.lse[..., None] - origin)
        total = of_list + product("bhgmn,bhnd->bhgmd", weights, means.v)
        return total.astype(out.dtype), joined

    return _by_chunk(join, sizes, q, levels, lse, out)


def add_gradients(
    dout: Array,
    dlse: Array | None,
    q: Array,
    k: Array,
    v: Array,
    levels: Array,
    out: Array,
    lse: Array,
    gradients: tuple[Array, Array, Array],
    **call,
) -> tuple[Array, Array, Array]:
    """dq, dk and dv of the list, plus what the means owe.

    Args:
        out, lse: joined, as `add_means` returned them.
        gradients: dq, dk and dv that an implementation made from that out and lse.
        **call: block_m, block_n, scale and is_causal.
    """
    sizes = _sizes(q, k, call)
    means = _means(k, v, sizes)
    dtype = accumulator(q.dtype)
    delta = (out.astype(dtype) * dout.astype(dtype)).sum(-1)
    if dlse is not None:
        delta = delta - dlse.astype(dtype)

    def of_chunk(owed: _Means, chunk: _Chunk, dout, delta, dq):
        weights = _weights(chunk, means, sizes)
        d_weights = product("bhgmd,bhnd->bhgmn", dout, means.v)
        # A row that sees nothing has no say, whatever stands in its gradient of lse.
        d_logits = jnp.where(weights == 0, 0, weights * (d_weights - delta[..., None]))
        d_logits = d_logits.astype(q.dtype)
        added = product("bhgmn,bhnd->bhgmd", d_logits, means.k) * sizes.scale
        dk = product("bhgmn,bhgmd->bhnd", d_logits, chunk.q) * sizes.scale
        dv = product("bhgmn,bhgmd->bhnd", weights.astype(q.dtype), dout)
        owed = _Means(owed.k + dk, owed.v + dv)
        return owed, (dq.astype(added.dtype) + added).astype(dq.dtype)

    dq, dk, dv = gradients
    owed, dq = _over_chunks(of_chunk, means, sizes, q, levels, lse, dout, delta, dq)
    return dq, _spread(owed.k, dk, sizes), _spread(owed.v, dv, sizes)


def add_tangents(
    tq: Array,
    tk: Array,
    tv: Array,
    q: Array,
    k: Array,
    v: Array,
    levels: Array,
    lse: Array,
    moved: Moved,
    **call,
) -> Moved:
    """The sums of forward mode over the list, plus those over the means.

    Args:
        tq, tk, tv: tangents of q, k and v.
        lse: joined, as `add_means` returned it.
        moved: what an implementation made with that lse.
        **call: block_m, block_n, scale and is_causal.
    """
    sizes = _sizes(q, k, call)
    means, t_means = _means(k, v, sizes), _means(tk, tv, sizes)

    def add(chunk: _Chunk, tq, of_lse, of_out, mean):
        weights = _weights(chunk, means, sizes)
        t_logits = product("bhgmd,bhnd->bhgmn", tq, means.k)
        t_logits = t_logits + product("bhgmd,bhnd->bhgmn", chunk.q, t_means.k)
        pushed = weights * (t_logits * sizes.scale)

        def weighted(weights, rows):
            return product("bhgmn,bhnd->bhgmd", weights.astype(rows.dtype), rows)

        return (
            of_lse + pushed.sum(-1),
            of_out + weighted(pushed, means.v) + weighted(weights, t_means.v),
            mean + weighted(weights, means.v),
        )

    return Moved(*_by_chunk(add, sizes, q, levels, lse, tq, *moved))


def _sizes(q: Array, k: Array, call: dict) -> _Sizes:
    (batch, heads, q_len, _), (kv_heads, kv_len) = q.shape, k.shape[1:3]
    return _Sizes(q_len, kv_len, batch=batch, heads=heads, kv_heads=kv_heads, **call)


def _means(k: Array, v: Array, sizes: _Sizes) -> _Means:
    return _Means(*(group_means(x, sizes.block_n).astype(x.dtype) for x in (k, v)))


def _spread(owed: Array, gradient: Array, sizes: _Sizes) -> Array:
    """`gradient` plus every key's share of its block's mean, rounded once."""
    counts = group_counts(sizes.kv_len, sizes.k_blocks, sizes.block_n, owed.dtype)
    share = jnp.repeat(owed / counts[:, None], sizes.block_n, axis=2)[:, :, : sizes.kv_len]
    return (gradient.astype(share.dtype) + share).astype(gradient.dtype)


def _logits(chunk: _Chunk, means: _Means, sizes: _Sizes) -> Array:
    """`[B, Hk, G, rows, Nk]` in natural units, -inf where a mean is not seen."""
    logits = product("bhgmd,bhnd->bhgmn", chunk.q, means.k) * sizes.scale
    counts = group_counts(sizes.kv_len, sizes.k_blocks, sizes.block_n, logits.dtype)
    seen = jnp.repeat(chunk.levels == 0, sizes.block_m, axis=3)
    if sizes.is_causal:
        starts = np.arange(sizes.k_blocks, dtype=np.int32) * sizes.block_n
        last = np.minimum(starts + sizes.block_n, sizes.kv_len) - 1
        seen = seen & (jnp.asarray(last, jnp.int32)[None, :] <= chunk.position[:, None])
    return jnp.where(seen, logits + np.log(counts), -jnp.inf)


def _weights(chunk: _Chunk, means: _Means, sizes: _Sizes) -> Array:
    lse = jnp.where(chunk.lse == -jnp.inf, jnp.inf, chunk.lse)
    return jnp.exp(_logits(chunk, means, sizes) - lse[..., None])


def _by_chunk(
    join: Callable, sizes: _Sizes, q: Array, levels: Array, lse: Array, *arrays: Array
) -> Any:
    """`join(chunk, *arrays of the chunk)` over all chunks, results in the layout of `q`."""

    def step(_, of_chunk):
        return None, join(*of_chunk)

    _, results = lax.scan(step, None, _split(sizes, q, levels, lse, *arrays))
    return tuple(_merge(x, sizes) for x in results)


def _over_chunks(of_chunk: Callable, means: _Means, sizes: _Sizes, q, levels, lse, *arrays):
    """`of_chunk(sums, chunk, *arrays of the chunk)` in turn: the sums, and its results put back."""

    def step(sums, of):
        return of_chunk(sums, *of)

    start = jax.tree.map(lambda x: filled_like(x, 0, accumulator(x.dtype)), means)
    sums, results = lax.scan(step, start, _split(sizes, q, levels, lse, *arrays))
    return sums, _merge(results, sizes)


def _split(sizes: _Sizes, q: Array, levels: Array, lse: Array, *arrays: Array):
    rows = sizes.at_once * sizes.block_m

    def of_rows(x):
        """`[B, H, Lq, ...]` to `[chunks, B, Hk, G, rows, ...]`, zeros past the end."""
        flat = x.reshape(*x.shape[:3], -1)
        return _apart(split_tokens(flat, sizes.chunks, rows), sizes, x.shape[3:])

    padded = split_tokens(levels, sizes.chunks, sizes.at_once)
    # Rows past the end have positions of their own, whatever they see is cut off.
    position = jnp.arange(sizes.chunks * rows, dtype=jnp.int32) + sizes.offset
    chunk = _Chunk(
        of_rows(q),
        _apart(padded, sizes, levels.shape[3:]),
        position.reshape(sizes.chunks, rows),
        of_rows(lse),
    )
    return chunk, *(of_rows(x) for x in arrays)


def _apart(x: Array, sizes: _Sizes, tail: tuple[int, ...]) -> Array:
    heads = (sizes.batch, sizes.kv_heads, sizes.heads // sizes.kv_heads)
    return jnp.moveaxis(x.reshape(*heads, *x.shape[2:4], *tail), 3, 0)


def _merge(x: Array, sizes: _Sizes) -> Array:
    """The inverse of splitting, `[chunks, B, Hk, G, rows, ...]` to `[B, H, Lq, ...]`."""
    x = jnp.moveaxis(x, 0, 3)
    x = x.reshape(sizes.batch, sizes.heads, -1, *x.shape[5:])
    return x[:, :, : sizes.q_len]
