"""Sequences of different lengths in one batch (specification, section 1).

Each sequence is a call of its own, neighbours of equal lengths one together, on whatever
implementation runs: so the result is that of the sequence alone, and what lies past its end is not
even read. The host has to know the lengths for that, and waits for the device once in every call.
"""

import itertools
import logging
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from psa_torch._checks import describe
from psa_torch._dispatch import announce
from psa_torch._transforms import is_transformed
from psa_torch.attention.ops import (
    NO_SECOND_DERIVATIVE,
    attention_backward,
    attention_forward,
    like_forward,
)
from shared_specs.checks import check_lens
from shared_specs.geometry import cdiv


def check_lengths(q: Tensor, q_lens: Tensor | None, kv_lens: Tensor | None) -> bool:
    """Whether lengths are given, which fit q `[B, H, Lq, D]`; their values are looked at later.

    Raises:
        TypeError: one does not hold integers.
        ValueError: one is not `[B]` on the device of q.
        NotImplementedError: they are given inside a transform.
    """
    for name, lens in (("q_lens", q_lens), ("kv_lens", kv_lens)):
        if lens is not None:
            check_lens(name, describe(name, lens), q.shape[0], str(q.device))
    if q_lens is None and kv_lens is None:
        return False
    if is_transformed():
        raise NotImplementedError(
            "q_lens and kv_lens are not supported inside torch.func transforms (grad, vjp, jacrev, "
            "vmap) and forward-mode differentiation; autograd's backward() runs on them"
        )
    return True


class Run(NamedTuple):
    """Batch entries of equal lengths, next to each other."""

    entries: slice
    q_len: int
    kv_len: int

    def of_queries(self, x: Tensor) -> Tensor:
        """What `x` `[B, H, Lq, ...]` has of these sequences; a view."""
        return x[self.entries, :, : self.q_len]

    def of_keys(self, x: Tensor) -> Tensor:
        """What `x` `[B, Hk, Lk, ...]` has of these sequences; a view."""
        return x[self.entries, :, : self.kv_len]

    def of_blocks(self, x: Tensor, block_m: int, block_n: int) -> Tensor:
        """What `x` `[B, H, Nq, Nk, ...]` has of these sequences; a view."""
        rows, columns = cdiv(self.q_len, block_m), cdiv(self.kv_len, block_n)
        return x[self.entries, :, :rows, :columns]


def runs(q: Tensor, k: Tensor, q_lens: Tensor | None, kv_lens: Tensor | None) -> Iterator[Run]:
    """The batch by lengths, without sequences that have no query or no key.

    Raises:
        ValueError: a length is not one of the axis.
        RuntimeError: the call is being captured in a CUDA graph.
    """
    if q.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("q_lens and kv_lens cannot be captured in a CUDA graph")
        announce(
            "%s make the host wait for the device in every call, and each length is a launch",
            "q_lens and kv_lens",
            level=logging.WARNING,
        )
    batch = q.shape[0]
    both = []
    for name, lens, most in (("q_lens", q_lens, q.shape[2]), ("kv_lens", kv_lens, k.shape[2])):
        listed = [most] * batch if lens is None else lens.tolist()
        if any(not 0 <= n <= most for n in listed):
            raise ValueError(f"{name} must be from 0 to {most}, got {listed}")
        both.append(listed)
    first = 0
    for (q_len, kv_len), equal in itertools.groupby(zip(*both, strict=True)):
        stop = first + len(list(equal))
        if q_len and kv_len:
            yield Run(slice(first, stop), q_len, kv_len)
        first = stop


@torch.library.custom_op("psa::sequences_forward", mutates_args=())
def sequences_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    levels: Tensor,
    q_lens: Tensor | None,
    kv_lens: Tensor | None,
    implementation: str | None,
    block_m: int,
    block_n: int,
    scale: float,
    is_causal: bool,
    rest: str,
) -> tuple[Tensor, Tensor]:
    """`psa::attention_forward` of each sequence; past its end out is 0 and lse -inf."""
    settings = implementation, block_m, block_n, scale, is_causal, rest
    out, lse = (
        x.fill_(value) for x, value in zip(like_forward(q, v), (0, -torch.inf), strict=True)
    )
    for run in runs(q, k, q_lens, kv_lens):
        taken = run.of_blocks(levels, block_m, block_n).contiguous()
        found = attention_forward(
            run.of_queries(q), run.of_keys(k), run.of_keys(v), taken, *settings
        )
        for whole, part in zip((out, lse), found, strict=True):
            run.of_queries(whole).copy_(part)
    return out, lse


@sequences_forward.register_fake
def _(q, k, v, *_):
    return like_forward(q, v)


@torch.library.custom_op("psa::sequences_backward", mutates_args=())
def sequences_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    levels: Tensor,
    q_lens: Tensor | None,
    kv_lens: Tensor | None,
    out: Tensor,
    lse: Tensor,
    implementation: str | None,
    block_m: int,
    block_n: int,
    scale: float,
    is_causal: bool,
    rest: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv; 0 past the end of a sequence."""
    settings = implementation, block_m, block_n, scale, is_causal, rest
    dq, dk, dv = (x.new_zeros(x.shape) for x in (q, k, v))
    for run in runs(q, k, q_lens, kv_lens):
        found = attention_backward(
            run.of_queries(dout),
            None if dlse is None else run.of_queries(dlse),
            run.of_queries(q),
            run.of_keys(k),
            run.of_keys(v),
            run.of_blocks(levels, block_m, block_n).contiguous(),
            run.of_queries(out).contiguous(),
            run.of_queries(lse).contiguous(),
            *settings,
        )
        run.of_queries(dq).copy_(found[0])
        run.of_keys(dk).copy_(found[1])
        run.of_keys(dv).copy_(found[2])
    return dq, dk, dv


@sequences_backward.register_fake
def _(dout, dlse, q, k, v, *_):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.settings = *inputs[:6], inputs[6:]
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse):
    no_grad = (None,) * (3 + len(ctx.settings))
    if dout is None and dlse is None:
        return None, None, None, *no_grad
    saved = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(saved[-2])
    return *sequences_backward(dout, dlse, *saved, *ctx.settings), *no_grad


def _no_second_derivative(ctx, *grads):
    raise NotImplementedError(NO_SECOND_DERIVATIVE)


sequences_forward.register_autograd(_backward, setup_context=_setup_context)
sequences_backward.register_autograd(_no_second_derivative)
