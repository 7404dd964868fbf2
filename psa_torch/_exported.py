"""Attention in an exported program: one operator that chooses levels and attends.

A tensor in a program may not have one block where it was traced with several: sizes of one are
a case of their own to PyTorch, and programs would begin at 129 tokens. So no tensor with an axis of
blocks leaves the operator; its backward pass chooses the levels once more, which gives the same.
"""

import torch
from torch import Tensor

from psa_torch._config import parse_config
from psa_torch._vmap import register_batch_rule
from psa_torch.attention.ops import attention_backward, attention_forward, like_forward
from psa_torch.choice import choose_levels
from shared_specs.config import resolve_scale


@torch.library.custom_op("psa::chosen_attention", mutates_args=())
def chosen_attention(
    q: Tensor, k: Tensor, v: Tensor, config: str, implementation: str | None
) -> tuple[Tensor, Tensor]:
    """out and lse at the levels that the configuration, given as JSON text, chooses."""
    settings = parse_config(config)
    return attention_forward(
        q,
        k,
        v,
        choose_levels(q, k, settings).levels,
        implementation,
        settings.block_m,
        settings.block_n,
        resolve_scale(settings.scale, q.shape[-1]),
        settings.causal,
        settings.rest,
    )


@chosen_attention.register_fake
def _(q, k, v, config, implementation):
    return like_forward(q, v)


@torch.library.custom_op("psa::chosen_attention_backward", mutates_args=())
def chosen_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    config: str,
    implementation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of `chosen_attention`."""
    settings = parse_config(config)
    return attention_backward(
        dout,
        dlse,
        q,
        k,
        v,
        choose_levels(q, k, settings).levels,
        out,
        lse,
        implementation,
        settings.block_m,
        settings.block_n,
        resolve_scale(settings.scale, q.shape[-1]),
        settings.causal,
        settings.rest,
    )


@chosen_attention_backward.register_fake
def _(dout, dlse, q, k, v, out, lse, config, implementation):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.config, ctx.implementation = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse):
    if dout is None and dlse is None:
        return (None,) * 5
    saved = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(saved[3])
    grads = chosen_attention_backward(dout, dlse, *saved, ctx.config, ctx.implementation)
    return *grads, None, None


chosen_attention.register_autograd(_backward, setup_context=_setup_context)
register_batch_rule(chosen_attention)
register_batch_rule(chosen_attention_backward)
