"""Forward-mode derivatives of the gathered rows."""

import torch
from torch import Tensor

from psa_torch.attention.gather.buffers import Buffers, query_blocks
from psa_torch.attention.gather.plan import Problem, batches
from psa_torch.pyramid import build_pyramid
from shared_specs.constants import LOG2E


@torch.no_grad()
def tangent(
    tq: Tensor,
    tk: Tensor,
    tv: Tensor,
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
) -> tuple[Tensor, Tensor]:
    """How out and lse move where q, k and v move by tq, tk and tv, with the levels held fixed.

    Args:
        tq, tk, tv: in the shapes and dtypes of q, k and v.
        out, lse: what `forward` returned for the other arguments.

    Returns:
        The tangents of out and lse, in their shapes and dtypes; 0 for rows that see nothing.
    """
    p = Problem.of(q, k, block_m=block_m, block_n=block_n, scale=scale, is_causal=is_causal)
    keys, values = build_pyramid(k.to(p.dtype), v.to(p.dtype), block_n)
    t_keys, t_values = build_pyramid(tk.to(p.dtype), tv.to(p.dtype), block_n)
    q_rows, tq_rows = query_blocks(p, q), query_blocks(p, tq)
    # With lse = inf all weights of a row that sees nothing are exactly 0.
    blind = lse == -torch.inf
    lse_rows = query_blocks(p, lse.masked_fill(blind, torch.inf) * LOG2E, value=torch.inf)

    t_out = q_rows.new_zeros(*q_rows.shape[:2], v.shape[3])
    t_lse = torch.zeros_like(lse_rows)
    buffers = Buffers(p)
    for batch in batches(p, levels):
        at, shape = batch.blocks, (len(batch.runs), block_m, batch.bias.shape[-1])
        weights = torch.sub(batch.bias, lse_rows[at, :, None], out=buffers.take("weights", *shape))
        rows = buffers.gather("rows", keys, batch.runs)
        weights.baddbmm_(q_rows[at], rows.mT, alpha=scale * LOG2E)
        if batch.hidden is not None:
            weights[..., -batch.hidden.shape[-1] :].masked_fill_(batch.hidden, -torch.inf)
        weights.exp2_()

        t_logits = torch.bmm(tq_rows[at], rows.mT, out=buffers.take("t_logits", *shape))
        t_logits.baddbmm_(q_rows[at], buffers.gather("rows", t_keys, batch.runs).mT)
        t_logits.mul_(scale)
        # dP = P * (dS - sum of P * dS), and that sum is the tangent of lse.
        mean = (weights * t_logits).sum(-1, keepdim=True)
        t_lse[at] = mean[..., 0]
        moved = t_logits.sub_(mean).mul_(weights)
        part = torch.bmm(moved, buffers.gather("rows", values, batch.runs))
        t_out[at] = part.baddbmm_(weights, buffers.gather("rows", t_values, batch.runs))

    heads = (p.batch, p.heads, -1)
    t_out = t_out.view(*heads, v.shape[3])[:, :, : p.q_len].to(out.dtype).contiguous()
    return t_out, t_lse.view(heads)[:, :, : p.q_len].contiguous()
