"""Gradients of the gathered rows."""

import torch
from torch import Tensor

from psa_torch.attention.gather.buffers import Buffers, query_blocks
from psa_torch.attention.gather.plan import Problem, batches
from psa_torch.pyramid import build_pyramid, unpool
from shared_specs.constants import LOG2E


@torch.no_grad()
def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    levels: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    block_m: int,
    block_n: int,
    scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `sum(out * dout) + sum(lse * dlse)` with the levels held fixed.

    Args:
        dout: `[B, H, Lq, Dv]`.
        dlse: `[B, H, Lq]`, or None for 0.
        out, lse: what `forward` returned for the other arguments.

    Returns:
        dq, dk, dv in the shapes and dtypes of q, k and v. The same bits on every run: the
        gradients of a pyramid row are added in a fixed order.
    """
    p = Problem.of(q, k, block_m=block_m, block_n=block_n, scale=scale, is_causal=is_causal)
    keys, values = build_pyramid(k.to(p.dtype), v.to(p.dtype), block_n)
    d_keys, d_values = torch.zeros_like(keys), torch.zeros_like(values)
    q_rows, dout_rows = query_blocks(p, q), query_blocks(p, dout)

    # A row that sees nothing passes no gradient: with lse = inf all its weights are exactly 0.
    blind = lse == -torch.inf
    lse_rows = query_blocks(p, lse.masked_fill(blind, torch.inf) * LOG2E, value=torch.inf)
    shift = -(dout.to(p.dtype) * out.to(p.dtype)).sum(-1)
    if dlse is not None:
        shift = shift + dlse
    shift_rows = query_blocks(p, shift.masked_fill_(blind, 0))

    dq_rows = torch.zeros_like(q_rows)
    buffers = Buffers(p)
    for batch in batches(p, levels):
        n, width = len(batch.runs), batch.bias.shape[-1]
        q_batch, dout_batch = q_rows[batch.blocks], dout_rows[batch.blocks]

        weights = buffers.take("weights", n, block_m, width)
        torch.sub(batch.bias, lse_rows[batch.blocks, :, None], out=weights)
        keys_batch = buffers.gather("keys", keys, batch.runs)
        weights.baddbmm_(q_batch, keys_batch.mT, alpha=scale * LOG2E)
        if batch.hidden is not None:
            weights[..., -batch.hidden.shape[-1] :].masked_fill_(batch.hidden, -torch.inf)
        weights.exp2_()
        share = buffers.take("share", n, width, v.shape[3])
        _add_runs(d_values, batch.runs, torch.bmm(weights.mT, dout_batch, out=share))

        # dS = P * (dP - delta + dlse), scale left to the end.
        d_logits = buffers.take("d_logits", n, block_m, width)
        values_batch = buffers.gather("values", values, batch.runs)
        torch.baddbmm(shift_rows[batch.blocks, :, None], dout_batch, values_batch.mT, out=d_logits)
        d_logits.mul_(weights)
        dq_rows[batch.blocks] = torch.bmm(d_logits, keys_batch)
        share = buffers.take("share", n, width, p.head_dim)
        _add_runs(d_keys, batch.runs, torch.bmm(d_logits.mT, q_batch, out=share))

    dq = dq_rows.mul_(scale).view(p.batch, p.heads, -1, p.head_dim)[:, :, : p.q_len]
    dk = unpool(d_keys.mul_(scale), p.kv_len, block_n)
    dv = unpool(d_values, p.kv_len, block_n)
    dq, dk, dv = (x.to(y.dtype).contiguous() for x, y in ((dq, q), (dk, k), (dv, v)))
    return dq, dk, dv


def _add_runs(pyramid: Tensor, runs: Tensor, rows: Tensor) -> None:
    """Add `rows` `[n, r * rows of a run, D]` to the runs `[n, r]` of `[B, Hk, P, D]`."""
    runs = runs.reshape(-1)
    rows = rows.view(len(runs), -1)
    pyramid = pyramid.view(-1, rows.shape[1])
    if pyramid.device.type == "cpu":
        pyramid.index_add_(0, runs, rows)
    else:
        # index_add_ uses atomics on a GPU; this sorts the indices and adds in their order.
        pyramid.index_put_((runs,), rows, accumulate=True)
