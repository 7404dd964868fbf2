"""Other libraries' attention on a CUDA device, each used where it is installed.

How to carry them to a machine without a network is in `docs/peers.md`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.binary_masks import FLEX_BLOCK, ordered, split_diagonal
from benchmarks.session import BINARY, DENSE, Provider
from benchmarks.workloads import BACKWARD, FORWARD

if TYPE_CHECKING:
    from benchmarks.torch_session import TorchSession


def peers(session: TorchSession) -> list[Provider]:
    """Providers of every peer; building one that is not installed raises ImportError."""
    return [_flash_attention_4(session), _flash_attention_4_sparse(session)]


def _flash_attention_4(session: TorchSession) -> Provider:
    def attention():
        from flash_attn.cute.interface import flash_attn_func

        causal = session.workload.config.causal
        return lambda q, k, v: flash_attn_func(q, k, v, causal=causal)[0]

    return Provider(
        name="torch-fa4", kind=DENSE, build=_heads_last(session, attention), output=_heads_first
    )


def _flash_attention_4_sparse(session: TorchSession) -> Provider:
    """On the binary mask that FlexAttention gets."""

    def attention():
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
        from flash_attn.cute.interface import flash_attn_func

        kept = torch.from_numpy(session.binary_levels()).to(session.device) > 0
        whole, partial = split_diagonal(kept, session.workload.config.causal)

        def lists(transpose: bool) -> Any:
            masks = (x.transpose(-1, -2) if transpose else x for x in (partial, whole))
            found = [tensor.contiguous() for x in masks for tensor in ordered(x)]
            return BlockSparseTensorsTorch(*found, block_size=(FLEX_BLOCK, FLEX_BLOCK))

        sparse = functools.partial(
            flash_attn_func,
            mask_mod=_causal_mask_mod() if session.workload.config.causal else None,
            block_sparse_tensors=lists(False),
            # Left out, the backward pass is dense without a word.
            block_sparse_tensors_bwd=lists(True),
        )
        return lambda q, k, v: sparse(q, k, v)[0]

    return Provider(
        name="torch-fa4-sparse",
        kind=BINARY,
        build=_heads_last(session, attention),
        output=_heads_first,
        levels=session.binary_levels,
        block_n=FLEX_BLOCK,
    )


def _heads_first(out: torch.Tensor) -> torch.Tensor:
    return out.transpose(1, 2)


def _heads_last(
    session: TorchSession, attention: Callable[[], Callable[..., torch.Tensor]]
) -> Callable[[str], Callable[[], Any]]:
    """A builder of the passes of `attention()(q, k, v)` on `[B, L, H, D]` copies of the inputs.

    The copies are made before anything is timed: a model that uses this layout has them so.
    """

    @functools.cache
    def made():
        attend = attention()
        q, k, v, dout = (
            x.transpose(1, 2).contiguous() for x in (session.q, session.k, session.v, session.dout)
        )
        return attend, (q, k, v), dout

    def build(which: str) -> Callable[[], Any]:
        attend, inputs, dout = made()
        if which == FORWARD:
            return torch.no_grad()(functools.partial(attend, *inputs))
        leaves = tuple(x.detach().requires_grad_() for x in inputs)
        if which == BACKWARD:
            out = attend(*leaves)
            return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)
        return lambda: torch.autograd.grad(attend(*leaves), leaves, dout)

    return build


def _causal_mask_mod() -> Any:
    """For the blocks on the diagonal."""
    import cutlass.cute as cute

    @cute.jit
    def causal(batch, head, row, column, seqlen_info, aux_tensors):
        return column <= row

    return causal
