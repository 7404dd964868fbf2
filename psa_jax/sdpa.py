"""`dot_product_attention` with the signature of `jax.nn`'s own."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from psa_jax._arrays import describe
from psa_jax._types import Overrides
from psa_jax.functional import psa_attention, refuse_masks
from shared_specs import checks
from shared_specs.config import PSAConfig


def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    *,
    scale: float | Array | None = None,
    is_causal: bool = False,
    query_seq_lengths: Array | None = None,
    key_value_seq_lengths: Array | None = None,
    local_window_size: Any = None,
    implementation: str | None = None,
    return_residual: bool = False,
    config: PSAConfig | None = None,
) -> Array | tuple[Array, Array]:
    """`psa_attention` where `jax.nn.dot_product_attention` is expected, in its layout.

    Args:
        query: `[B, Lq, H, D]` or `[Lq, H, D]`.
        key, value: `[B, Lk, Hk, D]` or `[Lk, Hk, D]`, `H % Hk == 0`.
        bias, mask: None.
        scale: factor on q.k, a number or an array 0-d or `[H]`; None means that of `config`.
        is_causal: `causal` of the configuration; True only for as many queries as keys, for JAX
            aligns the first query with the first key, and `causal` the last with the last.
        query_seq_lengths, key_value_seq_lengths, local_window_size: None.
        implementation: a key of `psa_jax.attention.IMPLEMENTATIONS`, or None for the best one; the
            names of JAX's implementations ('xla', 'cudnn') are none of them.
        return_residual: also return the log of the sum of exponentials, `[B, Lq, H]` or `[Lq, H]`.
        config: the configuration; None means the default one.

    Returns:
        In the shape and dtype of query; then the residual, if asked for.

    Raises:
        TypeError, ValueError: as `psa_attention`, or an argument asks for what is not there.
    """
    refuse_masks(bias=bias, mask=mask)
    for name, lengths in (
        ("query_seq_lengths", query_seq_lengths),
        ("key_value_seq_lengths", key_value_seq_lengths),
    ):
        if lengths is not None:
            raise ValueError(
                f"{name} must be None: sequences of different lengths in a batch are not "
                f"supported, call each alone; got {type(lengths).__name__}"
            )
    if local_window_size is not None:
        raise ValueError(
            "local_window_size must be None: which keys are seen is chosen, or given as levels= "
            f"to psa_attention; got {local_window_size!r}"
        )
    checks.check_flag("is_causal", is_causal)
    checks.check_flag("return_residual", return_residual)
    arrays = []
    for name, x in (("query", query), ("key", key), ("value", value)):
        shape = describe(name, x).shape
        if len(shape) not in (3, 4) or len(shape) != len(query.shape):
            raise ValueError(
                f"{name} must be [B, L, H, D], or [L, H, D] as query and the others, got shape "
                f"{tuple(shape)} beside query {tuple(query.shape)}"
            )
        x = x if len(shape) == 4 else x[None]
        arrays.append(jnp.swapaxes(x, 1, 2))
    overrides: Overrides = {} if scale is None else {"scale": scale}
    if is_causal:
        q_len, kv_len = arrays[0].shape[2], arrays[1].shape[2]
        if q_len != kv_len:
            raise ValueError(
                f"is_causal=True needs as many queries as keys, got {q_len} and {kv_len}; "
                "psa_attention(..., causal=True) aligns the last query with the last key"
            )
        overrides["causal"] = True
    q, k, v = arrays
    out, lse = psa_attention(
        q, k, v, config=config, return_lse=True, implementation=implementation, **overrides
    )
    out, lse = (jnp.swapaxes(x, 1, 2).reshape(*query.shape[:-1], *x.shape[3:]) for x in (out, lse))
    return (out, lse) if return_residual else out
