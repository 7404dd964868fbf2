"""How jax arrays meet the checks of `shared_specs.checks`, where they are, and what is said."""

from typing import Any

import jax
import numpy as np

from shared_specs.checks import Described
from shared_specs.dispatch import Announcer

announce = Announcer("psa_jax")


def describe(name: str, x: Any) -> Described:
    """What the shared checks look at.

    Raises:
        TypeError: `x` is not a jax or NumPy array.
    """
    if not isinstance(x, (jax.Array, np.ndarray)):
        raise TypeError(f"{name} must be a jax.Array, got {type(x).__name__}")
    return Described(tuple(x.shape), str(x.dtype))


def is_known(x: Any) -> bool:
    """Whether values can be read now without waiting for a device: concrete, and on the host.

    Inside `jit` values are unknown; on a GPU reading them would stall the program.
    """
    if isinstance(x, np.ndarray):
        return True
    if isinstance(x, jax.core.Tracer) or not x.is_fully_addressable:
        return False
    return all(device.platform == "cpu" for device in x.devices())


def platform_of(x: Any) -> str:
    """'cpu', 'gpu' or 'tpu': where `x` is, or inside `jit` where the default device is."""
    if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
        return next(iter(x.devices())).platform
    device = jax.config.jax_default_device
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform
