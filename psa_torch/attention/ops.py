"""Attention as a pair of torch operators, over whichever implementation runs.

`psa::attention_forward` and `psa::attention_backward` are opaque to `torch.compile` and
`torch.export`: shapes come from the fakes below, and the implementation is chosen when the
operator runs, on the tensors it then gets.
"""

import torch
from torch import Tensor

from psa_torch._checks import without_autocast
from psa_torch._dispatch import repeated
from psa_torch._eager import eager, wants_gradient
from psa_torch._vmap import register_batch_rule
from psa_torch.attention import rest as means_of_rest
from psa_torch.attention.implementations import IMPLEMENTATIONS, choose
from psa_torch.masks import check_level_values

NO_SECOND_DERIVATIVE = (
    "psa_torch attention has no second derivatives: its gradients cannot be differentiated again "
    "(gradient penalties, Hessians)"
)


@torch.library.custom_op("psa::attention_forward", mutates_args=())
@repeated
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    levels: Tensor,
    implementation: str | None,
    block_m: int,
    block_n: int,
    scale: float,
    is_causal: bool,
    rest: str,
) -> tuple[Tensor, Tensor]:
    """out and lse; arguments as in `psa_torch.sparse_attention`, dense integer levels.

    Raises:
        ValueError: the implementation cannot run, or (CPU) levels holds a value outside the set.
    """
    name = choose(implementation, q, k, v, block_m=block_m, block_n=block_n)
    check_level_values(levels)
    if not q.shape[0]:  # an empty batch: no implementation has to know
        return like_forward(q, v)
    levels = levels.int()
    settings = _settings(block_m, block_n, scale, is_causal)
    with without_autocast(q):
        found = IMPLEMENTATIONS[name].forward(q, k, v, levels, **settings)
        if rest == "mean":
            found = means_of_rest.add_means(q, k, v, levels, *found, **settings)
    return found


@attention_forward.register_fake
def _(q, k, v, *_):
    return like_forward(q, v)


def _settings(block_m: int, block_n: int, scale: float, is_causal: bool) -> dict:
    """What every pass of an implementation takes by name."""
    return {"block_m": block_m, "block_n": block_n, "scale": scale, "is_causal": is_causal}


def like_forward(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for out and lse."""
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=lse_dtype)


@torch.library.custom_op("psa::attention_backward", mutates_args=())
@repeated
def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    levels: Tensor,
    out: Tensor,
    lse: Tensor,
    implementation: str | None,
    block_m: int,
    block_n: int,
    scale: float,
    is_causal: bool,
    rest: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, from the gradients of out and lse (None for 0) and what forward returned."""
    name = choose(implementation, q, k, v, block_m=block_m, block_n=block_n)
    if not q.shape[0]:
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    arrays = q, k, v, levels.int(), out, lse
    settings = _settings(block_m, block_n, scale, is_causal)
    with without_autocast(q):
        found = IMPLEMENTATIONS[name].backward(dout, dlse, *arrays, **settings)
        if rest == "mean":
            found = means_of_rest.add_gradients(dout, dlse, *arrays, found, **settings)
    return found


@attention_backward.register_fake
def _(dout, dlse, q, k, v, *_):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@torch.library.custom_op("psa::attention_tangent", mutates_args=())
def attention_tangent(
    tq: Tensor,
    tk: Tensor,
    tv: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    levels: Tensor,
    out: Tensor,
    lse: Tensor,
    implementation: str | None,
    block_m: int,
    block_n: int,
    scale: float,
    is_causal: bool,
    rest: str,
) -> tuple[Tensor, Tensor]:
    """Tangents of out and lse, from those of q, k and v and what forward returned.

    Raises:
        NotImplementedError: the implementation that runs has no forward-mode derivatives.
    """
    name = choose(implementation, q, k, v, block_m=block_m, block_n=block_n)
    walk = getattr(IMPLEMENTATIONS[name], "tangent", None)
    if walk is None:
        raise NotImplementedError(
            f"psa_torch attention: implementation {name!r} has no forward-mode derivatives (jvp, "
            "jacfwd, dual tensors); implementation='gather' has, and reverse mode (grad, vjp, "
            "jacrev) runs on every one"
        )
    if not q.shape[0]:
        return like_forward(q, v)
    arrays = tq, tk, tv, q, k, v, levels.int(), out, lse
    settings = _settings(block_m, block_n, scale, is_causal)
    with without_autocast(q):
        found = walk(*arrays, **settings)
        if rest == "mean":
            found = means_of_rest.add_tangents(*arrays, found, **settings)
    return found


@attention_tangent.register_fake
def _(tq, tk, tv, q, k, v, *_):
    return like_forward(q, v)


def setup_context(ctx, inputs, output):
    """Keep what `backward` needs; inputs and output are those of `psa::attention_forward`."""
    q, k, v, levels, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, levels, *output)
    # Most callers use only out; None instead of a tensor of zeros then saves its pass.
    ctx.set_materialize_grads(False)


def backward(ctx, dout, dlse):
    """Gradients of the inputs of `psa::attention_forward`."""
    no_grad = (None,) * (1 + len(ctx.settings))
    if dout is None and dlse is None:
        return None, None, None, *no_grad
    *inputs, out, lse = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    # With create_graph the operator is what refuses the second derivative.
    run = attention_backward if torch.is_grad_enabled() else _eager_backward
    return *run(dout, dlse, *inputs, out, lse, *ctx.settings), *no_grad


def _no_second_derivative(ctx, *grads):
    raise NotImplementedError(NO_SECOND_DERIVATIVE)


attention_forward.register_autograd(backward, setup_context=setup_context)
attention_backward.register_autograd(_no_second_derivative)
attention_tangent.register_autograd(_no_second_derivative)
_eager_backward = eager(attention_backward)


class _Attention(torch.autograd.Function):
    """`psa::attention_forward` with its gradient, without the operator."""

    @staticmethod
    def forward(ctx, *inputs):
        output = attention_forward._init_fn(*inputs)
        setup_context(ctx, inputs, output)
        return output

    backward = staticmethod(backward)  # pyright: ignore[reportAssignmentType]


def eager_attention(q: Tensor, k: Tensor, v: Tensor, *rest) -> tuple[Tensor, Tensor]:
    """`psa::attention_forward` for an eager call (see `_eager`)."""
    if wants_gradient(q, k, v):
        return _Attention.apply(q, k, v, *rest)
    return attention_forward._init_fn(q, k, v, *rest)


@repeated
def forward_alone(*inputs) -> Tensor:
    """out of `psa::attention_forward`, for an eager call that wants neither lse nor a gradient."""
    return attention_forward._init_fn(*inputs)[0]


register_batch_rule(attention_tangent)
register_batch_rule(attention_forward)
register_batch_rule(attention_backward)
