"""Output and log-sum-exp of the gathered rows."""

import torch
from torch import Tensor

from psa_torch.attention.gather.buffers import Buffers, query_blocks
from psa_torch.attention.gather.plan import LOG2_E, Problem, batches
from psa_torch.pyramid import build_pyramid


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
        k, v: `[B, Hk, Lk, D]`.
        levels: int32 `[B, H, Nq, Nk]`.
        block_m, block_n, scale, is_causal: as in `psa_torch.sparse_attention`.

    Returns:
        out `[B, H, Lq, D]` in the dtype of q, and lse `[B, H, Lq]`, float32 (float64 for
        float64).
    """
    p = Problem.of(q, k, block_m=block_m, block_n=block_n, scale=scale, is_causal=is_causal)
    keys, values = build_pyramid(k.to(p.dtype), v.to(p.dtype), block_n)
    q_rows = query_blocks(p, q)
    out = torch.zeros_like(q_rows)
    top, total = torch.zeros_like(q_rows[..., :1]), torch.zeros_like(q_rows[..., :1])
    lowest = torch.finfo(p.dtype).min
    buffers = Buffers(p)
    for batch in batches(p, levels):
        logits = buffers.take("logits", len(batch.runs), block_m, batch.bias.shape[-1])
        gathered = buffers.gather("rows", keys, batch.runs)
        # Base 2 throughout: exp2 takes half the time of exp on a CPU.
        torch.baddbmm(
            batch.bias, q_rows[batch.blocks], gathered.mT, alpha=scale * LOG2_E, out=logits
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
    lse = (top + total.log2()).mul_(1 / LOG2_E)
    shape = (p.batch, p.heads, -1)
    out = out.view(*shape, p.head_dim)[:, :, : p.q_len].to(q.dtype)
    return out.contiguous(), lse.view(shape)[:, :, : p.q_len].contiguous()
