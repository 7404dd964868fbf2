"""Calls of psa_torch as a typed program makes them. Pyright reads this file; nothing runs it."""

from typing import assert_type

from torch import Tensor
from torch.distributed import ProcessGroup

from psa_torch import (
    PSAAttention,
    PSAConfig,
    PSAVideoAttention,
    distributed,
    psa_attention,
    sparse_attention,
)
from psa_torch.choice import choose_levels


def function(q: Tensor, k: Tensor, v: Tensor, flag: bool) -> None:
    print(psa_attention(q, k, v).shape)
    assert_type(psa_attention(q, k, v, block_n=128, causal=True), Tensor)
    out, lse = psa_attention(q, k, v, return_lse=True)
    assert_type((out, lse), tuple[Tensor, Tensor])
    out, levels = psa_attention(q, k, v, config=PSAConfig(), return_levels=True)
    assert_type(levels, Tensor)
    out, lse, levels = psa_attention(q, k, v, levels=levels, return_lse=True, return_levels=True)
    assert_type(psa_attention(q, k, v, return_lse=flag), Tensor | tuple[Tensor, ...])
    psa_attention(q, k, v, scale=q.mean(), mask_ratios={1: (0.0, 1.0)}, implementation="gather")
    psa_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False)

    psa_attention(q, k, v, blok_m=64)  # pyright: ignore[reportCallIssue]
    psa_attention(q, k, v, block_m="64")  # pyright: ignore[reportArgumentType, reportCallIssue]
    print(psa_attention(q, k, v, return_lse=True).shape)  # pyright: ignore[reportAttributeAccessIssue]
    out, lse, one = psa_attention(q, k, v, return_lse=True)  # pyright: ignore[reportAssignmentType]


def levels_given(q: Tensor, k: Tensor, v: Tensor, levels: Tensor) -> None:
    assert_type(sparse_attention(q, k, v, levels, block_m=128, block_n=64), Tensor)
    out, lse = sparse_attention(q, k, v, levels, block_m=64, block_n=32, return_lse=True)
    sparse_attention(q, k, v, levels, block_m=64)  # pyright: ignore[reportCallIssue]


def modules(q: Tensor, k: Tensor, v: Tensor) -> None:
    attention = PSAAttention(PSAConfig(mask_mode="thresholdbound"))
    assert_type(attention(q, k, v), Tensor)
    out, lse, levels = attention(q, k, v, return_lse=True, return_levels=True)
    attention(q, k, v, retun_lse=True)  # pyright: ignore[reportCallIssue]
    video = PSAVideoAttention(PSAConfig(), warmup_steps=2)
    assert_type(video(q, k, v, step=3), Tensor)
    out, lse = video(q, k, v, step=3, return_lse=True)


def spread(q: Tensor, group: ProcessGroup) -> None:
    assert_type(distributed.psa_attention(q, q, q, group=group), Tensor)
    out, lse = distributed.psa_attention(q, q, q, group=group, return_lse=True)
    distributed.psa_attention(q, q, q)  # pyright: ignore[reportCallIssue]


def rooms(q: Tensor, k: Tensor) -> None:
    print(choose_levels(q, k, PSAConfig()).levels.shape)
