"""Where the kernels run: a Hopper GPU, or Mosaic's interpreter inside `interpreted()`."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax

from psa_jax._arrays import platform_of

HOPPER = "9.0"
H100_MULTIPROCESSORS = 132
"""Thread blocks of a program that is compiled without a GPU in the machine."""

_interpreter: contextvars.ContextVar[Any] = contextvars.ContextVar("interpreter", default=None)


def interpreter() -> Any:
    """The interpreter's parameters inside `interpreted()`, else None."""
    return _interpreter.get()


@contextlib.contextmanager
def interpreted(*, detect_races: bool = False) -> Iterator[None]:
    """Interpret the kernels traced inside, on any device: slow, for tests.

    Nothing records this in compiled functions: trace inside, and do not reuse a jitted function
    that was traced outside.

    Args:
        detect_races: raise on accesses to shared memory that no barrier orders (JAX 0.12 and
            later).
    """
    token = _interpreter.set(_interpreter_params(detect_races))
    try:
        yield
    finally:
        _interpreter.reset(token)


def reset() -> None:
    """Make the interpreter usable again after an exception inside it."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    gpu_callbacks.reset_gpu_interpret_mode_state()


def _interpreter_params(detect_races: bool) -> Any:
    # jax 0.10 has the interpreter but does not export its parameters.
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams(detect_races=detect_races)


def multiprocessors() -> int:
    """Multiprocessors of the GPU, or of an H100 if there is none."""
    device = jax.devices()[0]
    return device.core_count if device.platform == "gpu" else H100_MULTIPROCESSORS


def device_reason(x: jax.Array) -> str | None:
    """Why the kernels cannot run where `x` is, or None."""
    if interpreter() is not None:
        return None
    platform = platform_of(x)
    if platform != "gpu":
        return f"needs a Hopper GPU (compute capability 9.0), the array is on {platform}"
    device = jax.devices("gpu")[0]
    capability = str(getattr(device, "compute_capability", "unknown"))
    if capability != HOPPER:
        return (
            "needs a Hopper GPU (compute capability 9.0), "
            f"{device.device_kind} has compute capability {capability}"
        )
    return None
