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


def largest(
    top: jax.Array,
    a,
    bs: list[Any],
    *,
    seen: list[Callable[[jax.Array], jax.Array]],
    full: list[Any],
    empty: list[Any],
    interpreted: bool,
) -> jax.Array:
    """The elementwise maximum of `top` and of every `seen(a @ b.T)`, float32 `[M, N]`.

    All products are under way at once: the maximum of one is taken while the next is multiplied.

    Args:
        top: float32 `[M, N]`.
        a, bs: operands in shared memory, `[M, D]` and `[N, D]` each.
        seen: what to make of each product.
        full, empty: barrier of each `b` to wait for, and to arrive at when it has been read.
    """
    if interpreted:
        for b, see, filled, read in zip(bs, seen, full, empty, strict=True):
            plgpu.barrier_wait(filled)
            top = jnp.maximum(top, see(_dot(a[...], b[...].T)))
            release(read, interpreted=True)
        return top

    for filled in full:
        plgpu.barrier_wait(filled)

    def multiply(*accs):
        result = top
        for acc, b in zip(accs, bs, strict=True):
            plgpu.wgmma(acc, a, _transposed(b))
        for i, (acc, see, read) in enumerate(zip(accs, seen, empty, strict=True)):
            product = plgpu.wgmma_accumulator_load(acc, wait_n=len(accs) - 1 - i)
            plgpu.barrier_arrive(read)
            result = jnp.maximum(result, see(product))
        return result

    shape = (a.shape[0], bs[0].shape[0])
    return pl.run_scoped(multiply, *(plgpu.ACC(shape, jnp.float32) for _ in bs))


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
    d_weights: jax.Array,
    operands: tuple[Any, Any, Any, Any],
    *,
    weights: Callable[[jax.Array], jax.Array],
    interpreted: bool,
    values_read: Callable[[], None],
) -> jax.Array:
    """`acc + (p * (d_weights + dout @ v.T)) @ k` with `p = weights(q @ k.T)`.

    Args:
        acc: float32 `[M, D]`.
        d_weights: float32 `[M, N]`.
        operands: q, dout `[M, D]`, k, v `[N, D]` in shared memory.
        weights: from products of q and k to attention weights.
        values_read: called when `v` is no longer needed.
    """
    q, dout, k, v = operands
    if interpreted:
        p = weights(_dot(q[...], k[...].T))
        d_weights = d_weights + _dot(dout[...], v[...].T)
        values_read()
        return acc + _dot((p * d_weights).astype(k.dtype), k[...])

    def multiply(refs):
        acc, d_weights = refs

        def inner(logits):
            plgpu.wgmma(logits, q, _transposed(k))
            plgpu.wgmma(d_weights, dout, _transposed(v))
            p = weights(plgpu.wgmma_accumulator_load(logits, wait_n=1))
            d_logits = p * plgpu.wgmma_accumulator_load(d_weights, wait_n=0)
            values_read()
            plgpu.wgmma(acc, d_logits.astype(k.dtype), k)

        pl.run_scoped(inner, plgpu.ACC((q.shape[0], k.shape[0]), jnp.float32))

    acc, _ = pl.run_state(multiply)((plgpu.ACC.init(acc), plgpu.ACC.init(d_weights)))
    return acc


def key_gradients(
    acc_k: jax.Array,
    acc_v: jax.Array,
    logits: jax.Array,
    d_weights: jax.Array,
    operands: tuple[Any, Any, Any, Any],
    *,
    weights: Callable[[jax.Array], jax.Array],
    interpreted: bool,
) -> tuple[jax.Array, jax.Array]:
    """`acc_k + (p * (d_weights + v @ dout.T)) @ q` and `acc_v + p @ dout`.

    Here `p = weights(logits + k @ q.T)`. What is added before the exponential and taken from the
    weights' gradient starts in the accumulators, where it takes no registers of its own.

    Args:
        acc_k, acc_v: float32 `[M, D]`.
        logits, d_weights: float32 `[M, N]`.
        operands: k, v `[M, D]`, q, dout `[N, D]` in shared memory.
        weights: from logits to attention weights, float32.
    """
    k, v, q, dout = operands
    if interpreted:
        p = weights(logits + _dot(k[...], q[...].T))
        acc_v = acc_v + _dot(p.astype(q.dtype), dout[...])
        d_logits = p * (d_weights + _dot(v[...], dout[...].T))
        return acc_k + _dot(d_logits.astype(q.dtype), q[...]), acc_v

    def multiply(refs):
        acc_k, acc_v, logits, d_weights = refs
        plgpu.wgmma(logits, k, _transposed(q))
        plgpu.wgmma(d_weights, v, _transposed(dout))
        p = weights(plgpu.wgmma_accumulator_load(logits, wait_n=1))
        d_logits = p * plgpu.wgmma_accumulator_load(d_weights, wait_n=0)
        plgpu.wgmma(acc_v, p.astype(q.dtype), dout)
        plgpu.wgmma(acc_k, d_logits.astype(q.dtype), q)

    starts = (acc_k, acc_v, logits, d_weights)
    acc_k, acc_v, _, _ = pl.run_state(multiply)(tuple(plgpu.ACC.init(x) for x in starts))
    return acc_k, acc_v


def tile_key_gradients(
    logits: jax.Array,
    d_weights: jax.Array,
    operands: tuple[Any, Any, Any, Any],
    *,
    weights: Callable[[jax.Array], jax.Array],
    interpreted: bool,
    meanwhile: Callable[[], None],
    store_k: Callable[[jax.Array], None],
    store_v: Callable[[jax.Array], None],
) -> None:
    """`store_k((p * (d_weights + v @ dout.T)) @ q)` and `store_v(p @ dout)`, float32 `[M, D]`.

    As `key_gradients`, with nothing to add to: the accumulators exist only after the logits are
    gone, so that twice as many queries fit the registers.

    Args:
        logits, d_weights, operands, weights: as for `key_gradients`.
        meanwhile: called while the first products are under way.
        store_k, store_v: take the results when `k` and `v` are no longer needed.
    """
    k, v, q, dout = operands
    if interpreted:
        p = weights(logits + _dot(k[...], q[...].T))
        d_logits = p * (d_weights + _dot(v[...], dout[...].T))
        meanwhile()
        store_v(_dot(p.astype(q.dtype), dout[...]))
        store_k(_dot(d_logits.astype(q.dtype), q[...]))
        return

    def multiply(refs):
        logits, d_weights = refs
        plgpu.wgmma(logits, k, _transposed(q))
        plgpu.wgmma(d_weights, v, _transposed(dout))
        meanwhile()
        p = weights(plgpu.wgmma_accumulator_load(logits, wait_n=1))
        d_logits = p * plgpu.wgmma_accumulator_load(d_weights, wait_n=0)
        p, d_logits = p.astype(q.dtype), d_logits.astype(q.dtype)

        def inner(acc_v, acc_k):
            plgpu.wgmma(acc_v, p, dout)
            plgpu.wgmma(acc_k, d_logits, q)
            store_v(plgpu.wgmma_accumulator_load(acc_v, wait_n=1))
            store_k(plgpu.wgmma_accumulator_load(acc_k, wait_n=0))

        acc = plgpu.ACC((k.shape[0], q.shape[1]), jnp.float32)
        pl.run_scoped(inner, acc, acc)

    pl.run_state(multiply)((plgpu.ACC.init(logits), plgpu.ACC.init(d_weights)))


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def release(barrier, *, interpreted: bool) -> None:
    """Tell the producer that this warpgroup has read a buffer."""
    if interpreted:
        # The products' reads are ordinary loads there; order them before the next copy.
        plgpu.commit_smem()
    plgpu.barrier_arrive(barrier)
