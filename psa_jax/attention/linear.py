"""The derivative of attention as two linear operations, each the transpose of the other.

Forward mode evaluates `tangent`, reverse mode transposes it into `gradient`. They are primitives of
JAX, because that is where it asks for a transpose, for a batch and for a derivative: both are
linear in their first arguments, and in the others, `saved`, they have none.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

NO_SECOND_DERIVATIVE = (
    "psa_jax attention has no second derivatives: only first ones, in forward or in reverse mode"
)

SAVED = 6
"""q, k, v, levels, out and lse."""


def tangent(call: Any, moved: tuple[Array, ...], saved: tuple[Array, ...]) -> tuple[Array, ...]:
    """Tangents of out and lse.

    Args:
        call: `differentiable.Call`, which computes it.
        moved: tangents of q, k and v.
        saved: q, k, v, levels, out and lse.
    """
    *arrays, lse = saved
    # Finite, so that `jax_debug_infs` finds none in what a forward pass hands to a backward pass.
    lse = jnp.where(lse == -jnp.inf, _unseen(lse), lse)
    return tuple(_tangent.bind(*moved, *arrays, lse, call=call))


def _unseen(lse: Array) -> float:
    """Stands for the lse of a row that sees nothing."""
    return float(jnp.finfo(lse.dtype).max)


def _restored(saved: tuple[Array, ...]) -> tuple[Array, ...]:
    *arrays, lse = saved
    return *arrays, jnp.where(lse == _unseen(lse), -jnp.inf, lse)


def _run_tangent(*args: Array, call: Any) -> list[Array]:
    return list(call.tangent(*args[:3], *_restored(args[3:])))


def _run_gradient(*args: Array, call: Any) -> list[Array]:
    dout, *dlse = args[:-SAVED]
    return list(call.backward(dout, dlse[0] if dlse else None, *_restored(args[-SAVED:])))


def _types_of_results(*args: Any, call: Any) -> list:
    return list(args[-2:])


def _types_of_inputs(*args: Any, call: Any) -> list:
    return list(args[-SAVED : -SAVED + 3])


def _transpose_tangent(cotangents, *args, call: Any) -> list:
    dout, dlse = cotangents
    saved = args[-SAVED:]
    given = (ad.instantiate_zeros(dout), *(() if type(dlse) is ad.Zero else (dlse,)))
    gradients = _gradient.bind(*given, *saved, call=call)
    return _where_linear(gradients, args)


def _transpose_gradient(cotangents, *args, call: Any) -> list:
    moved = _tangent.bind(*map(ad.instantiate_zeros, cotangents), *args[-SAVED:], call=call)
    return _where_linear(moved[: len(args) - SAVED], args)


def _where_linear(results, args) -> list:
    """A result for each linear argument that has no value yet, nothing for the others."""
    wanted = zip(results, args[:-SAVED], strict=True)
    found = [x if ad.is_undefined_primal(arg) else None for x, arg in wanted]
    return found + [None] * SAVED


def _jvp(primitive: Primitive, primals, tangents, *, call: Any):
    if any(type(x) is not ad.Zero for x in tangents[-SAVED:]):
        raise NotImplementedError(NO_SECOND_DERIVATIVE)
    moved = [ad.instantiate_zeros(x) for x in tangents[:-SAVED]]
    return (
        primitive.bind(*primals, call=call),
        primitive.bind(*moved, *primals[-SAVED:], call=call),
    )


def _batch(primitive: Primitive, args, axes, *, call: Any):
    """A longer batch, as `vmap_as_batch` has it."""
    pairs = list(zip(args, axes, strict=True))
    size = next(x.shape[axis] for x, axis in pairs if axis is not None)

    def folded(x, axis):
        if axis is None:
            x = jnp.broadcast_to(x[None], (size, *x.shape))
        else:
            x = jnp.moveaxis(x, axis, 0)
        return x.reshape(-1, *x.shape[2:])

    results = primitive.bind(*(folded(x, axis) for x, axis in pairs), call=call)
    return [x.reshape(size, -1, *x.shape[1:]) for x in results], [0] * len(results)


def _primitive(name: str, run, types, transpose) -> Primitive:
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_impl(jax.jit(run, static_argnames="call"))
    primitive.def_effectful_abstract_eval(
        lambda *args, call: (types(*args, call=call), call.effects(run, args))
    )
    mlir.register_lowering(primitive, mlir.lower_fun(run, multiple_results=True))
    ad.primitive_transposes[primitive] = transpose
    ad.primitive_jvps[primitive] = functools.partial(_jvp, primitive)
    batching.primitive_batchers[primitive] = functools.partial(_batch, primitive)
    return primitive


_tangent = _primitive("psa_attention_tangent", _run_tangent, _types_of_results, _transpose_tangent)
_gradient = _primitive(
    "psa_attention_gradient", _run_gradient, _types_of_inputs, _transpose_gradient
)
