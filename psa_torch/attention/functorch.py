"""Attention under `torch.func` transforms.

The autograd that `torch.library` generates for an operator refuses `torch.func.grad` and drops
the tangents of forward-mode differentiation without a word. While a transform is active the
operators therefore go through the autograd functions below, which can be transformed.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from psa_torch._vmap import batch_rule
from psa_torch.attention.ops import (
    NO_SECOND_DERIVATIVE,
    attention_backward,
    attention_forward,
)


def attention(q: Tensor, k: Tensor, v: Tensor, levels: Tensor, *settings) -> tuple[Tensor, Tensor]:
    """`psa::attention_forward`, under whatever transforms are active.

    Raises:
        NotImplementedError: q, k or v carry a tangent of forward-mode differentiation.
    """
    if torch.compiler.is_compiling():
        return attention_forward(q, k, v, levels, *settings)
    if any(forward_ad.unpack_dual(x).tangent is not None for x in (q, k, v)):
        raise NotImplementedError(
            "psa_torch attention has no forward-mode derivatives (jvp, jacfwd, dual tensors); use "
            "reverse mode (grad, vjp, jacrev)"
        )
    return _forward(q, k, v, levels, *settings)


def _forward(*args) -> tuple[Tensor, Tensor]:
    # Every `apply` takes one transform off, so this ends at the operator.
    if torch._C._are_functorch_transforms_active():
        return _Forward.apply(*args)
    return attention_forward(*args)


def _backward(*args) -> tuple[Tensor, Tensor, Tensor]:
    if torch._C._are_functorch_transforms_active():
        return _Backward.apply(*args)
    return attention_backward(*args)


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(*args):
        return _forward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, levels, *ctx.settings = inputs
        ctx.save_for_backward(q, k, v, levels, *output)

    @staticmethod
    def backward(ctx, dout, dlse):
        *inputs, out, lse = ctx.saved_tensors
        grads = _backward(dout, dlse, *inputs, out, lse, *ctx.settings)
        return *grads, None, *(None for _ in ctx.settings)

    vmap = staticmethod(batch_rule(_forward))


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(*args):
        return _backward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(NO_SECOND_DERIVATIVE)

    vmap = staticmethod(batch_rule(_backward))
