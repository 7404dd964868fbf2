"""What level 0 adds with `rest="mean"` (specification, section 4), to any implementation.

The softmax of a row runs over what its levels list and over one mean a block for the rest. An
implementation knows the list only, so the two parts are joined here by their log-sum-exps; its
backward pass, given the joined out and lse, then yields exactly what the list owes, and what the
means owe is added. One pass over `[Lq, Nk]` means, `1 / block_n` of dense attention, and no table.
"""

from torch import Tensor

from psa_torch._dispatch import use_kernels
from psa_torch.attention.rest import plain
from psa_torch.attention.rest.means import Call, spread_means

__all__ = ["add_gradients", "add_means", "add_tangents"]


def add_means(
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
    """out and lse of the list, joined by the means of the blocks at level 0; they are overwritten.

    Args:
        q: `[B, H, Lq, D]`; k: `[B, Hk, Lk, D]`; v: `[B, Hk, Lk, Dv]`.
        levels: dense int32 `[B, H, Nq, Nk]`.
        out, lse: `[B, H, Lq, Dv]` and `[B, H, Lq]`, of what `levels` lists.
    """
    g = Call(q.shape[2], k.shape[2], block_m, block_n, is_causal, scale)
    passes = _passes(q)
    passes.add_means(q, *passes.means_of_blocks(k, v, block_n), levels, out, lse, g)
    return out, lse


def add_gradients(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    levels: Tensor,
    out: Tensor,
    lse: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor],
    *,
    block_m: int,
    block_n: int,
    scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of the list, plus what the means owe; they are overwritten.

    Args:
        out, lse: joined, as `add_means` returned them.
        gradients: dq, dk, dv that an implementation made from that out and lse.
    """
    g = Call(q.shape[2], k.shape[2], block_m, block_n, is_causal, scale)
    dq, dk, dv = gradients
    passes = _passes(q)
    dk_means, dv_means = passes.add_gradients(
        dout, dlse, q, *passes.means_of_blocks(k, v, block_n), levels, out, lse, dq, g
    )
    return dq, spread_means(dk_means, dk, block_n), spread_means(dv_means, dv, block_n)


def add_tangents(
    tq: Tensor,
    tk: Tensor,
    tv: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    levels: Tensor,
    out: Tensor,
    lse: Tensor,
    tangents: tuple[Tensor, Tensor],
    *,
    block_m: int,
    block_n: int,
    scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    """Tangents of out and lse of the list, plus what the means owe.

    Args:
        out, lse: joined, as `add_means` returned them.
        tangents: of out and lse, that an implementation made from that out and lse.
    """
    g = Call(q.shape[2], k.shape[2], block_m, block_n, is_causal, scale)
    means = (plain.means_of_blocks(*x, block_n) for x in ((tk, tv), (k, v)))
    added = plain.tangents(tq, *next(means), q, *next(means), levels, out, lse, g)
    t_out, t_lse = ((x + y).to(x.dtype) for x, y in zip(tangents, added, strict=True))
    return t_out, t_lse


def _passes(q: Tensor):
    if not use_kernels(q):
        return plain
    from psa_torch.attention.rest import kernels

    return kernels
