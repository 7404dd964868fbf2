"""Calls of psa_jax as a typed program makes them. Pyright reads this file; nothing runs it."""

from typing import assert_type

from jax import Array

from psa_jax import (
    PSAAttention,
    PSAConfig,
    PSAVideoAttention,
    attention_fn,
    psa_attention,
    sparse_attention,
)
from psa_jax.functional import choose_levels


def function(q: Array, k: Array, v: Array, flag: bool) -> None:
    print(psa_attention(q, k, v).shape)
    assert_type(psa_attention(q, k, v, block_n=128, causal=True), Array)
    out, lse = psa_attention(q, k, v, return_lse=True)
    assert_type((out, lse), tuple[Array, Array])
    out, levels = psa_attention(q, k, v, config=PSAConfig(), return_levels=True)
    assert_type(levels, Array)
    out, lse, levels = psa_attention(q, k, v, levels=levels, return_lse=True, return_levels=True)
    assert_type(psa_attention(q, k, v, return_lse=flag), Array | tuple[Array, ...])
    psa_attention(q, k, v, scale=q.mean(), mask_ratios={1: (0.0, 1.0)}, implementation="gather")

    psa_attention(q, k, v, blok_m=64)  # pyright: ignore[reportCallIssue]
    psa_attention(q, k, v, block_m="64")  # pyright: ignore[reportArgumentType, reportCallIssue]
    print(psa_attention(q, k, v, return_lse=True).shape)  # pyright: ignore[reportAttributeAccessIssue]
    out, lse, one = psa_attention(q, k, v, return_lse=True)  # pyright: ignore[reportAssignmentType]


def levels_given(q: Array, k: Array, v: Array, levels: Array) -> None:
    assert_type(sparse_attention(q, k, v, levels, block_m=128, block_n=64), Array)
    out, lse = sparse_attention(q, k, v, levels, block_m=64, block_n=32, return_lse=True)
    sparse_attention(q, k, v, levels, block_m=64)  # pyright: ignore[reportCallIssue]


def modules(q: Array, k: Array, v: Array) -> None:
    attention = PSAAttention(PSAConfig(mask_mode="thresholdbound"))
    assert_type(attention(q, k, v), Array)
    out, lse, levels = attention(q, k, v, return_lse=True, return_levels=True)
    attention(q, k, v, retun_lse=True)  # pyright: ignore[reportCallIssue]
    video = PSAVideoAttention(PSAConfig(), warmup_steps=2)
    assert_type(video(q, k, v, step=3), Array)
    out, lse = video(q, k, v, step=3, return_lse=True)
    assert_type(attention_fn(causal=True)(q, k, v), Array)
    attention_fn(casual=True)  # pyright: ignore[reportCallIssue]


def rooms(q: Array, k: Array) -> None:
    print(choose_levels(q, k, PSAConfig()).levels.shape)
