"""What pooling a key block would lose: estimated defects (specification, section 5, `defect`)."""

import torch
from torch import Tensor

from psa_torch._checks import without_autocast
from shared_specs.defect import defect_offsets
from shared_specs.geometry import cdiv

CHUNK_ELEMENTS = 1 << 22
"""Logits held at one time, unless one query block of all heads alone has more."""


@torch.no_grad()
def defect_scores(
    q: Tensor,
    k: Tensor,
    *,
    block_m: int,
    block_n: int,
    sample_m: int,
    scale: float,
    causal: bool,
    rest_mean: bool,
) -> Tensor:
    """As `shared_specs.defect.defect_scores`, in float32 and a few query blocks at a time.

    Returns:
        float32 `[B, H, Nq, Nk, 4]`, without a gradient.

    Raises:
        ValueError: `sample_m` does not divide `block_m`.
    """
    offsets = defect_offsets(block_m, sample_m)
    (b, h, q_len, d), (_, h_kv, kv_len, _) = q.shape, k.shape
    n_q, n_k = cdiv(q_len, block_m), cdiv(kv_len, block_n)
    step, first = block_m // sample_m, int(offsets[0])
    at = torch.arange(n_q * sample_m, device=q.device) * step + first
    at = at.clamp(max=q_len - 1)
    keys = torch.nn.functional.pad(k.float(), (0, 0, 0, n_k * block_n - kv_len))
    columns = torch.arange(n_k * block_n, device=q.device)
    rows = sample_m * max(1, CHUNK_ELEMENTS // (b * h * sample_m * n_k * block_n))
    parts = []
    with without_autocast(q):
        for part in at.split(rows):
            left = q.index_select(2, part).float() * scale
            left = left.reshape(b, h_kv, (h // h_kv) * len(part), d)
            logits = (left @ keys.mT).reshape(b, h, len(part), -1)
            last = (part + kv_len - q_len)[:, None] if causal else kv_len
            seen = (columns < kv_len) & (columns <= last)
            lost = _lost_masses(logits, seen, columns < kv_len, block_n, rest_mean)
            parts.append(lost.square().unflatten(2, (-1, sample_m)).mean(3))
    return torch.cat(parts, 2)


def _lost_masses(logits, seen, real, block_n: int, rest_mean: bool) -> Tensor:
    """M_1 - M_l for l in 2, 4, 8, rest: `[B, H, rows, Nk, 4]`."""
    top = logits.masked_fill(~seen, -torch.inf).amax(-1, keepdim=True)
    logits = logits - top.masked_fill(top.isneginf(), 0)
    mass = logits.exp().masked_fill(~seen, 0).unflatten(-1, (-1, block_n)).sum(-1)
    total = mass.sum(-1, keepdim=True)
    total = total.masked_fill(total == 0, 1)
    lost = []
    for level in (2, 4, 8, block_n):
        if level == block_n and not rest_mean:
            lost.append(mass)
            continue
        count = real.unflatten(-1, (-1, level)).sum(-1)
        mean = (logits * real).unflatten(-1, (-1, level)).sum(-1) / count.clamp(min=1)
        whole = (seen | ~real).unflatten(-1, (-1, level)).all(-1) & (count > 0)
        weights = (count * mean.exp()).masked_fill(~whole, 0)
        lost.append(mass - weights.unflatten(-1, (-1, block_n // level)).sum(-1))
    return torch.stack(lost, -1) / total[..., None]
