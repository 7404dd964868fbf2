"""Matrix products of one warpgroup, on the tensor cores or in the interpreter.

Mosaic's interpreter runs neither `wgmma` with an operand in registers nor accumulators that
outlive a scope, so there every product is a `dot_general` of what the references hold. The
order of waits, copies and releases around it, which is what the interpreter is there to check,
stays the same.
"""

from __future__ import annotations

from collections.abc import Callable

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
        contract = (((1,), (1,)), ((), ()))
        return lax.dot_general(a[...], b[...], contract, preferred_element_type=jnp.float32)

    def multiply(acc):
        plgpu.wgmma(acc, a, _transposed(b))
        meanwhile()
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32))


def accumulate(
    acc: jax.Array, a: jax.Array, b, *, interpreted: bool, meanwhile: Callable[[], None] = lambda: None
) -> jax.Array:
    """`acc + a @ b`, `a` in registers, `b` in shared memory, `acc` float32."""
    if interpreted:
        meanwhile()
        contract = (((1,), (0,)), ((), ()))
        return acc + lax.dot_general(a, b[...], contract, preferred_element_type=jnp.float32)

    def multiply(acc):
        plgpu.wgmma(acc, a, b)
        meanwhile()

    return pl.run_state(multiply)(plgpu.ACC.init(acc))


def release(barrier, *, interpreted: bool) -> None:
    """Tell the producer that this warpgroup has read a buffer."""
    if interpreted:
        # The products' reads are ordinary loads there; order them before the next copy.
        plgpu.commit_smem()
    plgpu.barrier_arrive(barrier)
