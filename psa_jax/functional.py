"""Pyramid sparse attention as a function: from q, k and v to the output."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Unpack, overload

import jax
import jax.numpy as jnp
from jax import Array, lax

from psa_jax._arrays import absorb_scale, check_inputs, describe, is_array
from psa_jax._sharding import per_shard
from psa_jax._switches import numpy_rules
from psa_jax._types import CallArguments, Overrides
from psa_jax.attention import IMPLEMENTATIONS, choose, sparse_attention
from psa_jax.importance import block_scores
from psa_jax.masks import check_levels_of_form, from_segments, to_segments
from psa_jax.order import TokenOrder
from psa_jax.selection import select_levels
from psa_jax.similarity import similarity_cap
from shared_specs import checks
from shared_specs.budget import check_costs
from shared_specs.config import PSAConfig, check_config
from shared_specs.geometry import cdiv


@overload
def psa_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    return_lse: Literal[False] = False,
    return_levels: Literal[False] = False,
    **arguments: Unpack[CallArguments],
) -> Array: ...
@overload
def psa_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    return_lse: Literal[True],
    return_levels: Literal[True],
    **arguments: Unpack[CallArguments],
) -> tuple[Array, Array, Array]: ...
@overload
def psa_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    return_lse: Literal[True],
    return_levels: Literal[False] = False,
    **arguments: Unpack[CallArguments],
) -> tuple[Array, Array]: ...
@overload
def psa_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    return_lse: Literal[False] = False,
    return_levels: Literal[True],
    **arguments: Unpack[CallArguments],
) -> tuple[Array, Array]: ...
@overload
def psa_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    return_lse: bool = False,
    return_levels: bool = False,
    **arguments: Unpack[CallArguments],
) -> Array | tuple[Array, ...]: ...
@numpy_rules
def psa_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    config: PSAConfig | None = None,
    levels: Array | None = None,
    return_lse: bool = False,
    return_levels: bool = False,
    implementation: str | None = None,
    bias: None = None,
    mask: None = None,
    is_causal: bool = False,
    **overrides: Unpack[Overrides],
) -> Array | tuple[Array, ...]:
    """Pyramid sparse attention: choose a level for every block, attend over pooled keys.

    Differentiable once in q, k and v, in forward and in reverse mode, for the levels chosen; the
    choice itself has no gradient. Works under `jit` (the configuration is static), `vmap`,
    `jax.checkpoint`, `lax.scan`, `jax.export` and `jax.shard_map`; nothing between q, k, v and the
    output makes the host wait. Arrays sharded over batch and heads stay where they are (under a
    mesh with automatic axes, kernels need the call to be inside `jax.shard_map` for that).

    Args:
        q: `[B, H, Lq, D]`; float16, bfloat16, float32 or float64; D a multiple of 8 up to 256.
        k, v: `[B, Hk, Lk, D]` and `[B, Hk, Lk, Dv]`, `H % Hk == 0`, Dv like D; head h reads
            key/value head `h // (H // Hk)`.
        config: a `PSAConfig`; None means the default one. With a `rearrange_method` the tokens
            are reordered for attention (k-means starts cold in every call) and the output, lse
            included, is put back.
        levels: levels to use instead of choosing them: integers `[B, H, Nq, Nk]` with values in
            {0, 1, 2, 4, 8}, or segments `[B, H, Nq, Nk + 5]`. They index blocks of the reordered
            sequence if the configuration reorders it, as the levels that this function returns do.
        return_lse: also return the log of the sum of exponentials, `[B, H, Lq]`, float32.
        return_levels: also return the levels, in the serial form that `config.attn_impl` names:
            segments for 'new_mask_type', dense for 'old_mask_type'.
        implementation: a key of `psa_jax.attention.IMPLEMENTATIONS`, or None for the best one.
        bias, mask, is_causal: what callers of `jax.nn.dot_product_attention` pass along; only None,
            None and False, which change nothing, are accepted.
        **overrides: fields of `PSAConfig` that replace those of `config`. `scale` may be an array,
            0-d or `[H]`: it is multiplied into q and gets a gradient.

    Returns:
        out `[B, H, Lq, Dv]` in the dtype of q, then lse, then levels, each if asked for.

    Raises:
        TypeError: an argument has a type or dtype that is not accepted, or is unknown.
        ValueError: a value, a shape or a combination is not accepted; the message says what is.
    """
    refuse_masks(bias=bias, mask=mask)
    checks.check_flag("is_causal", is_causal)
    if is_causal:
        raise ValueError(
            "is_causal must be False, got True: causal attention is the field causal of the "
            "configuration (causal=True)"
        )
    scale = overrides.get("scale")
    if is_array(scale):
        overrides["scale"] = 1.0
    config = resolve_config(config, overrides)
    checks.check_flag("return_lse", return_lse)
    checks.check_flag("return_levels", return_levels)
    checks.check_implementation(implementation, IMPLEMENTATIONS)
    sizes = check_inputs(q, k, v)
    q, _ = absorb_scale(q, scale)
    TokenOrder.from_config(config, q.shape[2], k.shape[2])  # refuses lengths that do not fit
    form, given = None, ()
    blocks = {"block_m": config.block_m, "block_n": config.block_n}
    if levels is not None:
        form = checks.check_levels_shape(describe("levels", levels), *sizes[:2], **blocks)
        check_levels_of_form(levels, form)
        given = (lax.stop_gradient(levels),)
    run = functools.partial(
        _attend,
        config=config,
        form=form,
        return_lse=return_lse,
        return_levels=return_levels,
        implementation=choose(implementation, q, k, v, **blocks),
    )
    results = per_shard(run, q, k, v, *given, along_sequence=1 + return_lse)
    return results[0] if len(results) == 1 else results


def refuse_masks(**arguments) -> None:
    """Arguments of dense attention that say which keys are seen, or by how much: all None here.

    Raises:
        ValueError: one is not.
    """
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(
                f"{name} must be None: which keys are seen is chosen, or given as levels= to "
                f"psa_attention; a causal mask is the field causal of the configuration; got "
                f"{type(value).__name__}"
            )


# One program, compiled once for a configuration and shapes, with or without `jit` around it.
@functools.partial(
    jax.jit,
    static_argnames=("config", "form", "return_lse", "return_levels", "implementation"),
)
def _attend(
    q: Array,
    k: Array,
    v: Array,
    levels: Array | None = None,
    *,
    config: PSAConfig,
    form: str | None,
    return_lse: bool,
    return_levels: bool,
    implementation: str,
) -> tuple[Array, ...]:
    order = TokenOrder.from_config(config, q.shape[2], k.shape[2])
    q, k, v, state = order.apply(q, k, v)
    if levels is None:
        chosen = choose_levels(q, k, config)
    else:
        chosen = Chosen(from_segments(levels) if form == "segments" else levels, None)
    attended = sparse_attention(
        q,
        k,
        v,
        chosen.levels,
        block_m=config.block_m,
        block_n=config.block_n,
        scale=config.scale,
        is_causal=config.causal,
        rest=config.rest,
        implementation=implementation,
        return_lse=return_lse,
    )
    results = [order.undo(x, state) for x in (attended if return_lse else (attended,))]
    if return_levels:
        results.append(serial_levels(chosen, config))
    return tuple(results)


class Chosen(NamedTuple):
    """Levels and, where they were chosen here, the scores they were chosen by.

    Attributes:
        levels: int32 `[B, H, Nq, Nk]`.
        scores: float32 `[B, H, Nq, Nk]` (defects at rest where a budget chose) or None.
    """

    levels: Array
    scores: Array | None


@numpy_rules
def choose_levels(q: Array, k: Array, config: PSAConfig) -> Chosen:
    """Scores and levels of q and k as they stand, in whatever order their tokens are."""
    is_budget = config.mask_mode == "budget"
    rows, columns = cdiv(q.shape[2], config.block_m), cdiv(k.shape[2], config.block_n)
    if is_budget:  # refuses before any work
        check_costs(rows, columns, config.block_n)
    if not q.shape[0]:  # an empty batch: no room has to know
        scores = jnp.zeros((0, q.shape[1], rows, columns), jnp.float32)
        return Chosen(scores.astype(jnp.int32), scores)
    scores = block_scores(q, k, config)
    cap = similarity_cap(k, config) if config.use_sim_mask else None
    levels = select_levels(scores, config, q_len=q.shape[2], kv_len=k.shape[2], cap=cap)
    return Chosen(levels, scores[..., 3] if is_budget else scores)


def serial_levels(chosen: Chosen, config: PSAConfig) -> Array:
    """Levels in the form that `config.attn_impl` names, int32."""
    if config.attn_impl == "old_mask_type":
        return chosen.levels.astype(jnp.int32)
    return to_segments(chosen.levels, chosen.scores)


def resolve_config(config: PSAConfig | None, overrides: Mapping[str, Any]) -> PSAConfig:
    """`config` (the default one if None) with `overrides` in place.

    Raises:
        TypeError: `config` is not a PSAConfig, or an override is not one of its fields.
        ValueError: the result is not a valid configuration.
    """
    config = check_config(config)
    fields = [field.name for field in dataclasses.fields(PSAConfig)]
    unknown = [name for name in overrides if name not in fields]
    if unknown:
        raise TypeError(f"unknown arguments {unknown}; configuration fields: {', '.join(fields)}")
    return dataclasses.replace(config, **overrides) if overrides else config
