"""Attention over a pyramid at given levels (specification, section 4)."""

from typing import Literal, Unpack, overload

from torch import Tensor

from psa_torch._checks import absorb_scale, checked_inputs, levels_form, require_tensor
from psa_torch._eager import is_eager, wants_gradient
from psa_torch._types import SparseArguments
from psa_torch.attention import (
    flops,  # noqa: F401  registers the formulas
    ops,
)
from psa_torch.attention.functorch import attention
from psa_torch.attention.implementations import IMPLEMENTATIONS, choose
from psa_torch.attention.sequences import check_lengths, sequences_forward
from psa_torch.masks import from_segments
from shared_specs import checks
from shared_specs.config import resolve_scale

__all__ = ["IMPLEMENTATIONS", "choose", "sparse_attention"]


@overload
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    levels: Tensor,
    *,
    return_lse: Literal[False] = False,
    **arguments: Unpack[SparseArguments],
) -> Tensor: ...
@overload
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    levels: Tensor,
    *,
    return_lse: Literal[True],
    **arguments: Unpack[SparseArguments],
) -> tuple[Tensor, Tensor]: ...
@overload
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    levels: Tensor,
    *,
    return_lse: bool,
    **arguments: Unpack[SparseArguments],
) -> Tensor | tuple[Tensor, Tensor]: ...
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    levels: Tensor,
    *,
    block_m: int,
    block_n: int,
    scale: float | Tensor | None = None,
    is_causal: bool = False,
    rest: str = "skip",
    implementation: str | None = None,
    q_lens: Tensor | None = None,
    kv_lens: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every query over the pooled keys that its block's levels select.

    Differentiable in q, k and v, through out and lse, in reverse mode (autograd, `torch.func.grad`,
    `vjp`, `jacrev`) and, on `gather`, in forward mode (`jvp`, `jacfwd`, dual tensors); levels get
    no gradient, and there are no second derivatives. Inside `torch.autocast` q, k and v are cast as
    `scaled_dot_product_attention` casts them.

    Args:
        q: `[B, H, Lq, D]`; float16, bfloat16, float32 or float64; D a multiple of 8 up to 256.
        k, v: `[B, Hk, Lk, D]` and `[B, Hk, Lk, Dv]`, `H % Hk == 0`, Dv like D; head h reads
            key/value head `h // (H // Hk)`.
        levels: integers, `[B, H, Nq, Nk]` with values in {0, 1, 2, 4, 8}, or segments
            `[B, H, Nq, Nk + 5]`. Values are checked on the CPU; on a GPU that would make the
            host wait, and a block with a value outside the set is undefined.
        block_m: queries per block, 64 or 128.
        block_n: keys per block, 32, 64 or 128.
        scale: factor on q.k; None means `D ** -0.5`. A tensor, 0-d or `[H]`, is multiplied into q
            and gets a gradient.
        is_causal: a pooled key is visible iff its last covered key is at or before
            `row + Lk - Lq`.
        rest: what level 0 means: 'skip', the block is not seen, or 'mean', it is seen through the
            mean of its keys and values.
        implementation: a key of `IMPLEMENTATIONS`, or None for the best one that supports the
            input (logged once through the logger `psa_torch`).
        q_lens, kv_lens: tokens of each sequence, integers `[B]` on the device of q from 0 to Lq
            and Lk; None means all of them. Results are those of each sequence alone: what lies
            past its end is not read, its out is 0, its lse -inf and its gradients 0, and under
            `is_causal` its last query sees its last key. The host waits for the lengths.
        return_lse: also return the natural log of the sum of exponentials.

    Returns:
        out `[B, H, Lq, Dv]` in the dtype of q; and, if asked, lse `[B, H, Lq]`, float32 (float64
        for float64). A row that sees nothing has out 0, lse -inf and passes no gradient.

    Raises:
        TypeError: an argument has a type or dtype that is not accepted.
        ValueError: a shape, a device, a block size, a scale, a level or a length does not fit, or
            the implementation asked for cannot run on this input.
        NotImplementedError: lengths inside a `torch.func` transform.
    """
    checks.check_blocks(block_m, block_n)
    if not isinstance(scale, Tensor):
        checks.check_scale(scale)
    checks.check_flag("is_causal", is_causal)
    checks.check_flag("return_lse", return_lse)
    checks.check_rest(rest)
    checks.check_implementation(implementation, IMPLEMENTATIONS)
    require_tensor("levels", levels)
    inputs = checked_inputs(q, k, v)
    q, k, v = inputs.tensors
    q, factor = absorb_scale(q, scale)
    form = levels_form(levels, inputs, block_m=block_m, block_n=block_n)
    levels = levels.detach()
    out, lse = attend(
        q,
        k,
        v,
        from_segments(levels) if form == "segments" else levels,
        block_m=block_m,
        block_n=block_n,
        scale=factor,
        is_causal=is_causal,
        rest=rest,
        implementation=implementation,
        lens=(q_lens, kv_lens),
        keep_lse=return_lse,
    )
    return out if lse is None or not return_lse else (out, lse)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    levels: Tensor,
    *,
    block_m: int,
    block_n: int,
    scale: float | None,
    is_causal: bool,
    rest: str,
    implementation: str | None,
    lens: tuple[Tensor | None, Tensor | None] = (None, None),
    keep_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """out and lse of `sparse_attention`, for arguments that passed its checks.

    Args:
        q, k, v: as autocast has them.
        levels: dense, without a graph.
        lens: q_lens and kv_lens.
        keep_lse: whether the caller uses lse, which may be None otherwise.
    """
    settings = implementation, block_m, block_n, resolve_scale(scale, q.shape[-1]), is_causal, rest
    if check_lengths(q, *lens):
        return sequences_forward(q, k, v, levels, *lens, *settings)
    if not keep_lse and is_eager(q, k, v, levels) and not wants_gradient(q, k, v):
        return ops.forward_alone(q, k, v, levels, *settings), None
    return attention(q, k, v, levels, *settings)
