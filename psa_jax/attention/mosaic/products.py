"""Matrix products of one warpgroup, on the tensor cores or in the interpreter.

Mosaic's interpreter runs neither `wgmma` with an operand in registers nor accumulators that
outlive a scope, so there every product is a `dot_general` of what the references hold. The
order of waits, copies and releases around it, which is what the interpreter is there to check,
stays the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

SWIZZLE_BYTES = 128


def operand(shape: tuple[int, ...], dtype) -> plgpu.SMEM:
    """Shared memory laid out for `wgmma` and for copies by TMA."""
    width = SWIZZLE_BYTES // jnp.dtype(dtype).itemsize
    transforms = (plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(SWIZZLE_BYTES))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def compiler_params() -> plgpu.CompilerParams:
    return plgpu.CompilerParams(
        approx_math=True,
        lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        # Rows are reduced inside a warp, never across warps.
        reduction_scratch_bytes=0,
    )


def _transposed(ref):
    # jax 0.10 has no transpose on a reference; jax 0.12 deprecates the function.
    return ref.transpose((1, 0)) if hasattr(ref, "transpose") else plgpu.transpose_ref(ref, (1, 0))


def rows_times_rows(
    a, b, *, interpreted: bool, meanwhile: Callable[[], None] = lambda: None
) -> jax.Array:
    """`a @ b.T` in float32 of two operands in shared memory.

    Args:
        meanwhile: called while the product is under way.
    """
    if interpreted:
        meanwhile()
        return _dot(a[...], b[...].T)

    def multiply(acc):
        plgpu.wgmma(acc, a, _transposed(b))
        meanwhile()
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32))


def accumulate(
    acc: jax.Array,
    a: jax.Array,
    b,
    *,
    interpreted: bool,
    meanwhile: Callable[[], None] = lambda: None,
) -> jax.Array:
    """`acc + a @ b`, `a` in registers, `b` in shared memory, `acc` float32."""
    if interpreted:
        meanwhile()
        return acc + _dot(a, b[...])

    def multiply(acc):
        plgpu.wgmma(acc, a, b)
        meanwhile()

    return pl.run_state(multiply)(plgpu.ACC.init(acc))


def query_gradient(
    acc: jax.Array,
    operands: tuple[Any, Any, Any, Any],
    *,
    weights: Callable[[jax.Array], jax.Array],
    gradient: Callable[[jax.Array, jax.Array], jax.Array],
    interpreted: bool,
    values_read: Callable[[], None],
) -> jax.Array:
    """`acc + gradient(weights(q @ k.T), dout @ v.T) @ k`.

    Args:
        operands: q, dout `[M, D]`, k, v `[N, D]` in shared memory.
        weights: from products of q and k to attention weights.
        gradient: from weights and their gradient to the gradient of the logits, in the dtype
            of `k`.
        values_read: called when `v` is no longer needed.
    """
    q, dout, k, v = operands
    if interpreted:
        probabilities = weights(_dot(q[...], k[...].T))
        logits = gradient(probabilities, _dot(dout[...], v[...].T))
        values_read()
        return acc + _dot(logits, k[...])
    shape = (q.shape[0], k.shape[0])

    def multiply(acc):
        def inner(logits, d_weights):
            plgpu.wgmma(logits, q, _transposed(k))
            plgpu.wgmma(d_weights, dout, _transposed(v))
            probabilities = weights(plgpu.wgmma_accumulator_load(logits, wait_n=1))
            d_logits = gradient(probabilities, plgpu.wgmma_accumulator_load(d_weights, wait_n=0))
            values_read()
            plgpu.wgmma(acc, d_logits, k)

        pl.run_scoped(inner, plgpu.ACC(shape, jnp.float32), plgpu.ACC(shape, jnp.float32))

    return pl.run_state(multiply)(plgpu.ACC.init(acc))


def key_gradients(
    acc_k: jax.Array,
    acc_v: jax.Array,
    operands: tuple[Any, Any, Any, Any],
    *,
    weights: Callable[[jax.Array], jax.Array],
    gradient: Callable[[jax.Array, jax.Array], jax.Array],
    interpreted: bool,
) -> tuple[jax.Array, jax.Array]:
    """`acc_k + gradient(p, v @ dout.T) @ q` and `acc_v + p @ dout`, with `p = weights(k @ q.T)`.

    Args:
        operands: k, v `[M, D]`, q, dout `[N, D]` in shared memory.
        weights: from products of k and q to attention weights, float32.
        gradient: from weights and their gradient to the gradient of the logits, in the dtype
            of `q`.
    """
    k, v, q, dout = operands
    if interpreted:
        probabilities = weights(_dot(k[...], q[...].T))
        acc_v = acc_v + _dot(probabilities.astype(q.dtype), dout[...])
        d_logits = gradient(probabilities, _dot(v[...], dout[...].T))
        return acc_k + _dot(d_logits, q[...]), acc_v
    shape = (k.shape[0], q.shape[0])

    def multiply(refs):
        acc_k, acc_v = refs

        def inner(logits, d_weights):
            plgpu.wgmma(logits, k, _transposed(q))
            plgpu.wgmma(d_weights, v, _transposed(dout))
            probabilities = weights(plgpu.wgmma_accumulator_load(logits, wait_n=1))
            plgpu.wgmma(acc_v, probabilities.astype(q.dtype), dout)
            d_logits = gradient(probabilities, plgpu.wgmma_accumulator_load(d_weights, wait_n=1))
            plgpu.wgmma(acc_k, d_logits, q)

        pl.run_scoped(inner, plgpu.ACC(shape, jnp.float32), plgpu.ACC(shape, jnp.float32))

    return pl.run_state(multiply)((plgpu.ACC.init(acc_k), plgpu.ACC.init(acc_v)))


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def release(barrier, *, interpreted: bool) -> None:
    """Tell the producer that this warpgroup has read a buffer."""
    if interpreted:
        # The products' reads are ordinary loads there; order them before the next copy.
        plgpu.commit_smem()
    plgpu.barrier_arrive(barrier)
