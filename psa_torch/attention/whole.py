"""Levels and attention by them as one piece.

In an eager call on a GPU the kernels of scores, levels and attention are one recording (see
`_triton.launch`) instead of three, and what lies between them is memory of its own.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from psa_torch._config import Settings
from psa_torch._dispatch import repeated, use_kernels
from psa_torch._eager import is_eager, wants_gradient
from psa_torch.attention import ops
from psa_torch.attention.functorch import attention
from shared_specs.config import resolve_scale


def choose_and_attend(
    choose: Callable,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    settings: Settings,
    implementation: str | None,
    *,
    keep_lse: bool,
    keep_choice: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """out and lse of attention, and the levels and scores that `choose` gave.

    What is not kept may be None: its memory can then be used again inside the call.

    Args:
        choose: `choice.choose_levels`.
        q, k, v: as autocast has them, checked.
        implementation: as in `sparse_attention`.
        keep_lse: whether the caller uses lse.
        keep_choice: whether the caller uses levels and scores.
    """
    inputs = q, k, v, choose, settings, implementation
    if not (is_eager(q, k, v) and use_kernels(q)):
        return _choose_and_attend.__wrapped__(*inputs, True, True, True)
    if wants_gradient(q, k, v):
        return _Whole.apply(*inputs, keep_choice)
    return _choose_and_attend(*inputs, keep_lse, keep_choice, keep_choice)


@repeated
def _choose_and_attend(q, k, v, choose, settings, implementation, *keep):
    levels, scores = choose(q, k, settings)
    out, lse = attention(q, k, v, levels, *_attention_settings(q, settings, implementation))
    return out, *(x if kept else None for x, kept in zip((lse, levels, scores), keep, strict=True))


def _attention_settings(q: Tensor, settings: Settings, implementation: str | None) -> tuple:
    """What `psa::attention_forward` takes after its tensors."""
    scale = resolve_scale(settings.scale, q.shape[-1])
    blocks = settings.block_m, settings.block_n
    return implementation, *blocks, scale, settings.causal, settings.rest


class _Whole(torch.autograd.Function):
    """`_choose_and_attend` with the gradient of attention; the choice has none."""

    @staticmethod
    def forward(ctx, *inputs):
        *inputs, keep_scores = inputs
        q, k, v, _, settings, implementation = inputs
        out, lse, levels, scores = _choose_and_attend(*inputs, True, True, keep_scores)
        given = q, k, v, levels, *_attention_settings(q, settings, implementation)
        ops.setup_context(ctx, given, (out, lse))
        ctx.mark_non_differentiable(levels, *(() if scores is None else (scores,)))
        return out, lse, levels, scores

    @staticmethod
    def backward(ctx, dout, dlse, *_):
        return *ops.backward(ctx, dout, dlse)[:3], None, None, None, None
