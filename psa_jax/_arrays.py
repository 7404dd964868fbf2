"""How jax arrays meet the checks of `shared_specs.checks`, where they are, and what is said."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from shared_specs.checks import Described, check_qkv, check_scale
from shared_specs.dispatch import Announcer

announce = Announcer("psa_jax")


def describe(name: str, x: Any) -> Described:
    """What the shared checks look at.

    Raises:
        TypeError: `x` is not a jax or NumPy array.
    """
    if not is_array(x):
        raise TypeError(f"{name} must be a jax.Array, got {type(x).__name__}")
    return Described(tuple(x.shape), str(x.dtype))


def check_inputs(q: Any, k: Any, v: Any) -> tuple[Described, Described, Described]:
    """What the shared checks look at of q, k and v, once they fit each other.

    Raises:
        TypeError, ValueError: as `check_qkv` says, or one is not an array.
    """
    sizes = describe("q", q), describe("k", k), describe("v", v)
    # A batch of nothing is as good as any other if the rest fits.
    empty = all(len(x.shape) == 4 and x.shape[0] == 0 for x in sizes)
    check_qkv(*(x._replace(shape=(1, *x.shape[1:])) if empty else x for x in sizes))
    return sizes


def is_array(x: Any) -> bool:
    """Whether `x` is an array, of JAX (traced or not) or of NumPy, and not a number."""
    return isinstance(x, (jax.Array, np.ndarray))


def absorb_scale(q: Array, scale: Any) -> tuple[Array, Any]:
    """q and the number that is left of `scale`: an array is multiplied into q, which keeps its
    gradient; anything else is for the checks of numbers to judge.

    Args:
        q: `[B, H, Lq, D]`.
        scale: a floating array, 0-d or `[H]`, traced or not; or anything else.

    Raises:
        TypeError: an array that is not floating.
        ValueError: an array of another shape, or one that is known not to be finite in float32.
    """
    if not is_array(scale):
        return q, scale
    if not jnp.issubdtype(scale.dtype, jnp.floating):
        raise TypeError(f"scale must be a number or a floating array, got {scale.dtype}")
    heads = q.shape[1]
    if scale.shape not in ((), (heads,)):
        raise ValueError(
            f"scale must be a number, or an array of shape () or [H] = ({heads},), "
            f"got shape {tuple(scale.shape)}"
        )
    if is_known(scale):
        for factor in np.asarray(scale, np.float64).ravel():
            check_scale(factor)
    # In float32, or float64 if one of them is that, and rounded once to the dtype of q.
    wide = "float64" if "float64" in (str(q.dtype), str(scale.dtype)) else "float32"
    wide = jax.dtypes.canonicalize_dtype(wide)
    factor = jnp.asarray(scale, wide).reshape(1, -1, 1, 1)
    return (q.astype(wide) * factor).astype(q.dtype), 1.0


def is_known(x: Any) -> bool:
    """Whether values can be read now without waiting for a device: concrete, and on the host.

    Inside `jit` values are unknown; on a GPU reading them would stall the program.
    """
    if isinstance(x, np.ndarray):
        return True
    if isinstance(x, Tracer) or not x.is_fully_addressable:
        return False
    return all(device.platform == "cpu" for device in x.devices())


def platform_of(x: Any) -> str:
    """'cpu', 'gpu' or 'tpu': where `x` is, or inside `jit` where the default device is."""
    if isinstance(x, jax.Array) and not isinstance(x, Tracer):
        return next(iter(x.devices())).platform
    device: Any = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform
