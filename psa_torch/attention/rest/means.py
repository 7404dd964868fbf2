"""Row R of the pyramid (specification, section 2): one mean key and one mean value a block."""

import dataclasses

import torch
from torch import Tensor

from psa_torch.pyramid import group_means
from shared_specs.geometry import Geometry, cdiv


@dataclasses.dataclass(frozen=True)
class Call(Geometry):
    """What is not a tensor in a call: its sizes and the factor on q.k."""

    scale: float


def block_means(x: Tensor, block_n: int) -> Tensor:
    """Means of the real tokens of each block, `[B, Hk, Nk, D]` contiguous in the dtype of `x`.

    Args:
        x: `[B, Hk, Lk, D]`; sums are float32 (float64 for float64).
    """
    return group_means(x, block_n).to(x.dtype).contiguous()


def block_counts(kv_len: int, block_n: int, device: torch.device) -> Tensor:
    """Real keys of each block, int64 `[Nk]`."""
    starts = torch.arange(cdiv(kv_len, block_n), device=device) * block_n
    return (kv_len - starts).clamp(max=block_n)


def spread_means(d_means: Tensor, gradient: Tensor, block_n: int) -> Tensor:
    """`gradient` with every key's share of its block's mean added in place, rounded once.

    Args:
        d_means: gradients of the means, `[B, Hk, Nk, D]`.
        gradient: `[B, Hk, Lk, D]`, contiguous.
    """
    length = gradient.shape[2]
    whole = length // block_n
    cut = whole * block_n
    blocks = gradient[:, :, :cut].unflatten(2, (whole, block_n)) if whole else None
    if blocks is not None:
        blocks += (d_means[:, :, :whole] / block_n)[:, :, :, None]
    if cut < length:
        gradient[:, :, cut:] += d_means[:, :, whole:] / (length - cut)
    return gradient
