"""Attention under `torch.func` transforms.

The autograd that `torch.library` generates for an operator refuses `torch.func.grad` and drops
the tangents of forward-mode differentiation without a word. While a transform is active the
operators therefore go through the autograd functions below, which can be transformed.
"""

import torch
from torch import Tensor

from psa_torch._eager import is_eager
from psa_torch._transforms import is_transformed
from psa_torch._vmap import batch_rule
from psa_torch.attention.ops import (
    NO_SECOND_DERIVATIVE,
    attention_backward,
    attention_forward,
    attention_tangent,
    eager_attention,
)


def attention(q: Tensor, k: Tensor, v: Tensor, levels: Tensor, *settings) -> tuple[Tensor, Tensor]:
    """`psa::attention_forward`, under whatever transforms are active.

    Raises:
        NotImplementedError: q, k or v carry a tangent of forward-mode differentiation, and the
            implementation has no forward mode.
    """
    if is_eager(q, k, v, levels):
        return eager_attention(q, k, v, levels, *settings)
    if torch.compiler.is_compiling() and is_transformed():
        return _untraced(q, k, v, levels, *settings)
    return _forward(q, k, v, levels, *settings)


@torch.compiler.disable(
    reason="psa_torch attention inside a torch.func transform is differentiated outside of the "
    "compiled graph; compile without fullgraph=True, or transform the compiled function"
)
def _untraced(*args) -> tuple[Tensor, Tensor]:
    return _forward(*args)


def _forward(*args) -> tuple[Tensor, Tensor]:
    # Every `apply` takes one transform off, so this ends at the operator.
    if is_transformed():
        return _Forward.apply(*args)
    return attention_forward(*args)


def _backward(*args) -> tuple[Tensor, Tensor, Tensor]:
    if torch._C._are_functorch_transforms_active():
        return _Backward.apply(*args)
    return attention_backward(*args)


def _tangent(*args) -> tuple[Tensor, Tensor]:
    if torch._C._are_functorch_transforms_active():
        return _Tangent.apply(*args)
    return attention_tangent(*args)


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(*args):
        if torch._C._are_functorch_transforms_active():
            return _forward(*args)
        return attention_forward(*args)  # below forward mode, whose level stays set

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, levels, *ctx.settings = inputs
        ctx.save_for_backward(q, k, v, levels, *output)
        ctx.save_for_forward(q, k, v, levels, *output)

    @staticmethod
    def jvp(ctx, tq, tk, tv, *_):
        saved = ctx.saved_tensors
        moved = [
            torch.zeros_like(x) if tangent is None else tangent
            for x, tangent in zip(saved[:3], (tq, tk, tv), strict=True)
        ]
        return _tangent(*moved, *saved, *ctx.settings)

    @staticmethod
    def backward(ctx, dout, dlse):
        *inputs, out, lse = ctx.saved_tensors
        grads = _backward(dout, dlse, *inputs, out, lse, *ctx.settings)
        return *grads, None, *(None for _ in ctx.settings)

    vmap = staticmethod(batch_rule(_forward))


class _Last(torch.autograd.Function):
    """A derivative, which has none itself."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(NO_SECOND_DERIVATIVE)

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError(NO_SECOND_DERIVATIVE)


class _Backward(_Last):
    @staticmethod
    def forward(*args):
        return _backward(*args)

    vmap = staticmethod(batch_rule(_backward))


class _Tangent(_Last):
    @staticmethod
    def forward(*args):
        return _tangent(*args)

    vmap = staticmethod(batch_rule(_tangent))
