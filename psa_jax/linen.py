"""Pyramid sparse attention in Flax: a module, and a function for Flax's own attention layer."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, Unpack, overload

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from psa_jax._arrays import describe
from psa_jax._types import ModuleArguments, Overrides
from psa_jax.functional import psa_attention, resolve_config
from shared_specs.checks import check_flag
from shared_specs.config import PSAConfig


class PSAAttention(nn.Module):
    """Pyramid sparse attention with a fixed configuration; no parameters, no state.

    Attributes:
        config: the configuration, static; None means the default one.
    """

    config: PSAConfig | None = None

    def setup(self) -> None:
        resolve_config(self.config, {})

    @overload
    def __call__(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        return_lse: Literal[False] = False,
        return_levels: Literal[False] = False,
        **arguments: Unpack[ModuleArguments],
    ) -> Array: ...
    @overload
    def __call__(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        return_lse: Literal[True],
        return_levels: Literal[True],
        **arguments: Unpack[ModuleArguments],
    ) -> tuple[Array, Array, Array]: ...
    @overload
    def __call__(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        return_lse: Literal[True],
        return_levels: Literal[False] = False,
        **arguments: Unpack[ModuleArguments],
    ) -> tuple[Array, Array]: ...
    @overload
    def __call__(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        return_lse: Literal[False] = False,
        return_levels: Literal[True],
        **arguments: Unpack[ModuleArguments],
    ) -> tuple[Array, Array]: ...
    @overload
    def __call__(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        return_lse: bool = False,
        return_levels: bool = False,
        **arguments: Unpack[ModuleArguments],
    ) -> Array | tuple[Array, ...]: ...
    def __call__(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        levels: Array | None = None,
        return_lse: bool = False,
        return_levels: bool = False,
        implementation: str | None = None,
    ) -> Array | tuple[Array, ...]:
        """`psa_jax.psa_attention` with this module's configuration; arguments as there."""
        return psa_attention(
            q,
            k,
            v,
            config=self.config,
            levels=levels,
            return_lse=return_lse,
            return_levels=return_levels,
            implementation=implementation,
        )


def attention_fn(
    config: PSAConfig | None = None,
    *,
    implementation: str | None = None,
    **overrides: Unpack[Overrides],
) -> Callable[..., Array]:
    """A function for the `attention_fn` of Flax's own layers, linen and nnx.

    These are `flax.linen.MultiHeadDotProductAttention` and `flax.nnx.MultiHeadAttention`.

    It takes query `[..., Lq, H, D]` and key, value `[..., Lk, H, D]`, as Flax lays them out, and
    what it cannot honour it refuses: masks other than the causal one of the configuration, a
    bias, dropout of attention weights, and the weights themselves (`sow_weights`). The layer's
    `is_causal=True` makes a call causal as `PSAConfig(causal=True)` does; it is refused against a
    token order, and where queries and keys differ in number.

    Args:
        config: a `PSAConfig`; None means the default one.
        implementation: a key of `psa_jax.attention.IMPLEMENTATIONS`, or None for the best one.
        **overrides: fields of `PSAConfig` that replace those of `config`.

    Raises:
        TypeError, ValueError: the configuration is not valid.
    """
    config = resolve_config(config, overrides)

    # The names are those that Flax looks for; it passes on only the ones that are there.
    def attend(
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None = None,
        mask: Array | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: Any = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: nn.Module | None = None,
        force_fp32_for_softmax: bool = False,
        einsum_dot_general: Callable | None = None,
        qk_attn_weights_einsum: Callable | None = None,
        attn_weights_value_einsum: Callable | None = None,
        is_causal: bool = False,
    ) -> Array:
        # The softmax is in float32 and float32 products are exact whatever is asked for, so
        # precision and force_fp32_for_softmax are honoured; broadcast_dropout and dropout_rng
        # matter only with dropout.
        if mask is not None:
            raise ValueError(
                f"mask must be None, got one of shape {tuple(mask.shape)}: pyramid sparse "
                "attention chooses its own mask; for a causal one use PSAConfig(causal=True)"
            )
        if bias is not None:
            raise ValueError(f"bias must be None, got one of shape {tuple(bias.shape)}")
        if dropout_rate and not deterministic:
            raise ValueError(
                f"dropout_rate must be 0 or deterministic True, got dropout_rate={dropout_rate}: "
                "attention weights are never formed, so they cannot be dropped"
            )
        if module is not None:
            raise ValueError("sow_weights must be False: attention weights are never formed")
        for name, einsum in (
            ("einsum_dot_general", einsum_dot_general),
            ("qk_attn_weights_einsum", qk_attn_weights_einsum),
            ("attn_weights_value_einsum", attn_weights_value_einsum),
        ):
            if einsum is not None:
                raise ValueError(f"{name} must be None: the products are not einsums here")
        check_flag("is_causal", is_causal)
        tensors = []
        for name, x in (("query", query), ("key", key), ("value", value)):
            if len(describe(name, x).shape) < 3:
                raise ValueError(f"{name} must be [..., L, H, D], got shape {tuple(x.shape)}")
            x = x.reshape(-1, *x.shape[-3:]).swapaxes(1, 2)
            tensors.append(x if dtype is None else x.astype(jnp.dtype(dtype)))
        q_len, kv_len = tensors[0].shape[2], tensors[1].shape[2]
        if is_causal and q_len != kv_len:
            # Flax's first query sees the first key; here the last query sees the last key.
            raise ValueError(
                f"is_causal=True needs as many keys as queries, got {q_len} queries and {kv_len} "
                "keys; to let the last query see the last key use PSAConfig(causal=True)"
            )
        called = dataclasses.replace(config, causal=True) if is_causal else config
        out = psa_attention(*tensors, config=called, implementation=implementation)
        return out.swapaxes(1, 2).reshape(*query.shape[:-1], value.shape[-1])

    return attend
