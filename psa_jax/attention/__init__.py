"""Attention over a pyramid at given levels (specification, section 4)."""

import functools
from typing import Literal, Unpack, overload

import jax
import jax.numpy as jnp
from jax import Array, lax

from psa_jax._arrays import absorb_scale, check_inputs, describe, is_array
from psa_jax._sharding import per_shard, vary_alike
from psa_jax._switches import numpy_rules
from psa_jax._types import SparseArguments
from psa_jax.attention.differentiable import Call, attention
from psa_jax.attention.implementations import IMPLEMENTATIONS, choose
from psa_jax.masks import check_levels_of_form, from_segments
from psa_jax.pyramid import accumulator
from shared_specs import checks
from shared_specs.config import resolve_scale

__all__ = ["IMPLEMENTATIONS", "choose", "sparse_attention"]


@overload
def sparse_attention(
    q: Array,
    k: Array,
    v: Array,
    levels: Array,
    *,
    return_lse: Literal[False] = False,
    **arguments: Unpack[SparseArguments],
) -> Array: ...
@overload
def sparse_attention(
    q: Array,
    k: Array,
    v: Array,
    levels: Array,
    *,
    return_lse: Literal[True],
    **arguments: Unpack[SparseArguments],
) -> tuple[Array, Array]: ...
@overload
def sparse_attention(
    q: Array,
    k: Array,
    v: Array,
    levels: Array,
    *,
    return_lse: bool,
    **arguments: Unpack[SparseArguments],
) -> Array | tuple[Array, Array]: ...
@numpy_rules
def sparse_attention(
    q: Array,
    k: Array,
    v: Array,
    levels: Array,
    *,
    block_m: int,
    block_n: int,
    scale: float | Array | None = None,
    is_causal: bool = False,
    rest: str = "skip",
    implementation: str | None = None,
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """Attention of every query over the pooled keys that its block's levels select.

    Differentiable once in q, k and v, in forward and in reverse mode, through out and lse; levels
    get no gradient. Works under `jit`, `vmap`, `jax.checkpoint`, `lax.scan`, `jax.export` and
    `jax.shard_map`; arrays sharded over batch and heads stay where they are (under a mesh with
    automatic axes, a kernel needs the call to be inside `jax.shard_map` for that).

    Args:
        q: `[B, H, Lq, D]`; float16, bfloat16, float32 or float64; D a multiple of 8 up to 256.
        k, v: `[B, Hk, Lk, D]` and `[B, Hk, Lk, Dv]`, `H % Hk == 0`, Dv like D; head h reads
            key/value head `h // (H // Hk)`.
        levels: integers, `[B, H, Nq, Nk]` with values in {0, 1, 2, 4, 8}, or segments
            `[B, H, Nq, Nk + 5]`. Values are checked where they are known: concrete arrays on the
            CPU. Elsewhere a block with a value outside the set is skipped.
        block_m: queries per block, 64 or 128.
        block_n: keys per block, 32, 64 or 128.
        scale: factor on q.k; None means `D ** -0.5`. A number is static under `jit`; an array, 0-d
            or `[H]`, is multiplied into q and gets a gradient.
        is_causal: a pooled key is visible iff its last covered key is at or before
            `row + Lk - Lq`.
        rest: what level 0 means: 'skip', the block is not seen, or 'mean', it is seen through the
            mean of its keys and values.
        implementation: a key of `IMPLEMENTATIONS`, or None for the best one that supports the
            input (logged once through the logger `psa_jax`).
        return_lse: also return the natural log of the sum of exponentials.

    Returns:
        out `[B, H, Lq, Dv]` in the dtype of q; and, if asked, lse `[B, H, Lq]`, float32 (float64
        for float64). A row that sees nothing has out 0, lse -inf and passes no gradient.

    Raises:
        TypeError: an argument has a type or dtype that is not accepted.
        ValueError: a shape, a block size, a scale, a sharding or a level does not fit, or the
            implementation asked for cannot run on this input.
    """
    checks.check_blocks(block_m, block_n)
    if not is_array(scale):
        checks.check_scale(scale)
    checks.check_flag("is_causal", is_causal)
    checks.check_flag("return_lse", return_lse)
    checks.check_rest(rest)
    checks.check_implementation(implementation, IMPLEMENTATIONS)
    sizes = check_inputs(q, k, v)
    q, factor = absorb_scale(q, scale)
    form = checks.check_levels_shape(
        describe("levels", levels), *sizes[:2], block_m=block_m, block_n=block_n
    )
    check_levels_of_form(levels, form)
    factor = resolve_scale(factor, q.shape[-1])

    if not q.shape[0]:  # an empty batch: no implementation has to know
        out = jnp.zeros((*q.shape[:3], v.shape[3]), q.dtype)
        lse = jnp.zeros(q.shape[:3], accumulator(q.dtype))
        return (out, lse) if return_lse else out
    name = choose(implementation, q, k, v, block_m=block_m, block_n=block_n)
    call = Call(name, block_m, block_n, factor, is_causal, rest)
    run = functools.partial(_attend, call=call, form=form, return_lse=return_lse)
    levels = lax.stop_gradient(levels)
    return per_shard(run, q, k, v, levels, along_sequence=1 + return_lse)


# Compiled as one program and kept, also for callers that do not use `jit` themselves: run
# operation by operation, the loops inside would be compiled anew in every call.
@functools.partial(jax.jit, static_argnames=("call", "form", "return_lse"))
def _attend(q, k, v, levels, *, call: Call, form: str, return_lse: bool):
    dense = from_segments(levels) if form == "segments" else levels.astype(jnp.int32)
    arrays = vary_alike((q, k, v, dense))
    out, lse = attention(call, *arrays)
    return (out, lse) if return_lse else out
