"""Output and log-sum-exp of the gathered rows."""

import dataclasses

import torch
from torch import Tensor

from psa_torch.attention.gather.buffers import Buffers, query_blocks
from psa_torch.attention.gather.plan import Problem, batches
from psa_torch.pyramid import build_pyramid
from shared_specs.constants import LOG2E

CACHED_ROWS = 2**14
"""Pyramid rows of the key heads taken together on a CPU. The next ones go into the same memory: a
new pyramid of all heads is tens of thousands of page faults, a tenth of the call."""


@torch.no_grad()
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    levels: Tensor,
    *,
    block_m: int,
    block_n: int,
    scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    """Sparse attention at the given levels (specification, section 4).

    Args:
        q: `[B, H, Lq, D]`.
        k, v: `[B, Hk, Lk, D]` and `[B, Hk, Lk, Dv]`.
        levels: int32 `[B, H, Nq, Nk]`.
        block_m, block_n, scale, is_causal: as in `psa_torch.sparse_attention`.

    Returns:
        out `[B, H, Lq, Dv]` in the dtype of q, and lse `[B, H, Lq]`, float32 (float64 for
        float64).
    """
    whole = Problem.of(q, k, block_m=block_m, block_n=block_n, scale=scale, is_causal=is_causal)
    units, group = whole.batch * whole.kv_heads, whole.heads // whole.kv_heads
    # One entry for each key head, so that any number of them can be taken together.
    arrays = [x.reshape(units, -1, *x.shape[2:]) for x in (q, k, v, levels)]
    rows = (units, group * whole.q_blocks, block_m)
    out = torch.zeros(*rows, v.shape[3], dtype=whole.dtype, device=whole.device)
    lse = torch.empty(rows, dtype=whole.dtype, device=whole.device)
    buffers = Buffers(whole)
    step = _units_at_once(whole)
    for first in range(0, units, step):
        some = slice(first, first + step)
        p = dataclasses.replace(whole, batch=len(out[some]), heads=group, kv_heads=1)
        qs, ks, vs, listed = (x[some] for x in arrays)
        lse[some] = _some_heads(p, buffers, qs, ks, vs, listed, out[some].flatten(0, 1))
    shape = (whole.batch, whole.heads, -1)
    out = out.view(*shape, v.shape[3])[:, :, : whole.q_len].to(q.dtype)
    return out.contiguous(), lse.view(shape)[:, :, : whole.q_len].contiguous()


def _units_at_once(p: Problem) -> int:
    """Key heads to take together. On a GPU all: each step would wait for its own plan."""
    if p.device.type != "cpu":
        return p.batch * p.kv_heads
    return max(1, CACHED_ROWS // (p.head_runs * p.run_rows))


def _some_heads(
    p: Problem, buffers: Buffers, q: Tensor, k: Tensor, v: Tensor, levels: Tensor, out: Tensor
) -> Tensor:
    """Write the query blocks `[n, block_m, Dv]` of `out`, zeros before, and return their lse."""
    keys, values = build_pyramid(k.to(p.dtype), v.to(p.dtype), p.block_n)
    q_rows = query_blocks(p, q)
    top, total = torch.zeros_like(q_rows[..., :1]), torch.zeros_like(q_rows[..., :1])
    lowest = torch.finfo(p.dtype).min
    for batch in batches(p, levels):
        logits = buffers.take("logits", len(batch.runs), p.block_m, batch.bias.shape[-1])
        gathered = buffers.gather("rows", keys, batch.runs)
        # Base 2 throughout: exp2 takes half the time of exp on a CPU.
        torch.baddbmm(
            batch.bias, q_rows[batch.blocks], gathered.mT, alpha=p.scale * LOG2E, out=logits
        )
        if batch.hidden is not None:
            logits[..., -batch.hidden.shape[-1] :].masked_fill_(batch.hidden, -torch.inf)
        # A row that sees nothing has maximum -inf; a finite one gives it weights 0, not NaN.
        maximum = logits.amax(-1, keepdim=True).clamp_(min=lowest)
        weights = logits.sub_(maximum).exp2_()
        weight = weights.sum(-1, keepdim=True)
        top[batch.blocks], total[batch.blocks] = maximum, weight
        gathered = buffers.gather("rows", values, batch.runs)
        # The largest weight is 1, so only rows that see nothing are below it.
        out[batch.blocks] = torch.bmm(weights, gathered).div_(weight.clamp_(min=1))
    lse = (top + total.log2()).mul_(1 / LOG2E)
    return lse.view(p.batch, -1, p.block_m)
