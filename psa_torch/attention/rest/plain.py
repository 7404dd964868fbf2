"""The means of the rest in plain torch: the reference of the kernels, and what a CPU runs."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from psa_torch.attention.rest.means import Call, block_counts, block_means
from psa_torch.pyramid import accumulator

_ELEMENTS = 1 << 24
"""Logits that stand in memory at once."""


class _Chunk(NamedTuple):
    """Some query rows of all heads and their logits, `[B, Hk, H // Hk, rows, Nk]`."""

    rows: slice
    q: Tensor
    logits: Tensor


def means_of_blocks(k: Tensor, v: Tensor, block_n: int) -> tuple[Tensor, Tensor]:
    """Mean key and mean value of every block."""
    return block_means(k, block_n), block_means(v, block_n)


@torch.no_grad()
def add_means(q, k_means, v_means, levels, out, lse, g: Call) -> None:
    """As `psa_torch.attention.rest.add_means`, over the means `[B, Hk, Nk, D]`."""
    values = v_means.to(accumulator(q))[:, :, None]
    for chunk in _chunks(q, k_means, levels, g):
        listed, of_list = (_grouped(x[:, :, chunk.rows], k_means) for x in (lse, out))
        joined = torch.logaddexp(listed, chunk.logits.logsumexp(-1))
        origin = joined.masked_fill(joined == -torch.inf, 0)[..., None]
        weights = (chunk.logits - origin).exp()
        total = of_list * (listed[..., None] - origin).exp() + weights @ values
        out[:, :, chunk.rows] = total.flatten(1, 2).to(out.dtype)
        lse[:, :, chunk.rows] = joined.flatten(1, 2)


@torch.no_grad()
def add_gradients(
    dout, dlse, q, k_means, v_means, levels, out, lse, dq, g: Call
) -> tuple[Tensor, Tensor]:
    """Adds to `dq` in place; returns gradients of the means, `[B, Hk, Nk, D]`."""
    dtype = accumulator(q)
    keys, values = (x.to(dtype)[:, :, None] for x in (k_means, v_means))
    dk, dv = torch.zeros_like(keys[:, :, 0]), torch.zeros_like(values[:, :, 0])
    for chunk in _chunks(q, k_means, levels, g):
        of_out, grad = (_grouped(x[:, :, chunk.rows], k_means) for x in (out, dout))
        weights = _weights(chunk, lse, k_means)
        delta = (of_out * grad).sum(-1, keepdim=True)
        if dlse is not None:
            delta = delta - _grouped(dlse[:, :, chunk.rows], k_means)[..., None]
        d_logits = weights * (grad @ values.mT - delta)
        # A row that sees nothing has no say, whatever stands in its gradient of lse.
        d_logits = d_logits.masked_fill(weights == 0, 0) * g.scale
        dq[:, :, chunk.rows] += (d_logits @ keys).flatten(1, 2)
        dk += (d_logits.mT @ chunk.q).sum(2)
        dv += (weights.mT @ grad).sum(2)
    return dk, dv


@torch.no_grad()
def tangents(
    tq, tk_means, tv_means, q, k_means, v_means, levels, out, lse, g: Call
) -> tuple[Tensor, Tensor]:
    """What the means add to the tangents of out and lse, in the dtype of sums."""
    keys, values, t_keys, t_values = (
        x.to(accumulator(q))[:, :, None] for x in (k_means, v_means, tk_means, tv_means)
    )
    t_out, t_lse = out.new_zeros(out.shape, dtype=keys.dtype), torch.zeros_like(lse)
    for chunk in _chunks(q, k_means, levels, g):
        weights = _weights(chunk, lse, k_means)
        t_logits = _grouped(tq[:, :, chunk.rows], k_means) @ keys.mT + chunk.q @ t_keys.mT
        moved = weights * (t_logits * g.scale)
        # The implementation takes its own part of lse's tangent times out away, this takes ours.
        part = moved.sum(-1)
        of_out = _grouped(out[:, :, chunk.rows], k_means)
        total = moved @ values + weights @ t_values - part[..., None] * of_out
        t_out[:, :, chunk.rows] = total.flatten(1, 2)
        t_lse[:, :, chunk.rows] = part.flatten(1, 2)
    return t_out, t_lse


def _chunks(q: Tensor, k_means: Tensor, levels: Tensor, g: Call) -> Iterator[_Chunk]:
    """Logits in natural units, -inf where a mean is not seen."""
    batch, heads, blocks = q.shape[0], q.shape[1], k_means.shape[2]
    keys = k_means.to(accumulator(q))[:, :, None]
    counts = block_counts(g.kv_len, g.block_n, q.device)
    bias = counts.to(keys.dtype).log()
    last = torch.arange(blocks, device=q.device) * g.block_n + counts - 1
    at_once = max(1, _ELEMENTS // (batch * heads * blocks * g.block_m))
    for first in range(0, levels.shape[2], at_once):
        rows = slice(first * g.block_m, min((first + at_once) * g.block_m, g.q_len))
        queries = _grouped(q[:, :, rows], k_means)
        position = torch.arange(rows.start, rows.stop, device=q.device)
        at_rest = _grouped(levels[:, :, first : first + at_once] == 0, k_means, None)
        seen = at_rest[:, :, :, position // g.block_m - first]
        if g.is_causal:
            seen = seen & (last <= (position + g.offset)[:, None])
        logits = (queries @ keys.mT).mul_(g.scale).add_(bias).masked_fill_(~seen, -torch.inf)
        yield _Chunk(rows, queries, logits)


def _grouped(x: Tensor, k_means: Tensor, dtype: torch.dtype | None = torch.float32) -> Tensor:
    """`[B, H, ...]` to `[B, Hk, H // Hk, ...]`, in the dtype of sums unless that is None."""
    if dtype is not None:
        x = x.to(accumulator(k_means))
    return x.unflatten(1, (k_means.shape[1], -1))


def _weights(chunk: _Chunk, lse: Tensor, k_means: Tensor) -> Tensor:
    of_rows = _grouped(lse[:, :, chunk.rows], k_means)[..., None]
    return (chunk.logits - of_rows.masked_fill(of_rows == -torch.inf, torch.inf)).exp()
