"""PyTorch and JAX behind one small interface, loaded only when the demo runs."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from shared_specs.config import PSAConfig
from shared_specs.masks import SEPARATOR, from_segments
from shared_specs.tools.demo.baselines import chunked_dense

DEVICES = ("cpu", "gpu")


class Framework(Protocol):
    """What the demo asks of a framework; arrays are the framework's own."""

    title: str

    def array(self, x: np.ndarray) -> Any:
        """`x` on the device; float32 on a CPU, bfloat16 on a GPU."""
        ...

    def numpy(self, x: Any) -> np.ndarray:
        """`x` as NumPy, floating point as float32."""
        ...

    def dense(self, q: Any, k: Any, v: Any) -> Any:
        """The framework's best dense attention here."""
        ...

    def sparse(self, q: Any, k: Any, v: Any, config: PSAConfig) -> tuple[Any, Any]:
        """(out, levels) of the whole call, from q, k, v."""
        ...

    def wait(self, x: Any) -> None:
        """Return when `x` has been computed."""
        ...


class Torch:
    """PyTorch: `scaled_dot_product_attention` and `psa_torch`."""

    title = "PyTorch"

    def __init__(self, device: str):
        import torch

        import psa_torch

        if device == "gpu" and not torch.cuda.is_available():
            raise ValueError("device 'gpu' asked for, but PyTorch sees no CUDA device")
        self._torch, self._psa = torch, psa_torch
        self._device = "cuda" if device == "gpu" else "cpu"
        self._dtype = torch.bfloat16 if device == "gpu" else torch.float32

    def array(self, x):
        return self._torch.from_numpy(x).to(self._device, self._dtype)

    def numpy(self, x):
        x = x.detach().cpu()
        return (x.float() if x.is_floating_point() else x).numpy()

    def dense(self, q, k, v):
        return self._torch.nn.functional.scaled_dot_product_attention(q, k, v)

    def sparse(self, q, k, v, config):
        return self._psa.psa_attention(q, k, v, config=config, return_levels=True)

    def wait(self, x):
        if self._device == "cuda":
            self._torch.cuda.synchronize()


class Jax:
    """JAX: jitted dense attention (cuDNN on a GPU, chunked softmax on a CPU) and `psa_jax`."""

    title = "JAX"

    def __init__(self, device: str):
        # Both frameworks share one GPU here: JAX must not reserve most of its memory.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        import jax

        import psa_jax

        try:
            self._device = jax.devices(device)[0]
        except RuntimeError as error:
            raise ValueError(f"device {device!r} asked for, but JAX has none: {error}") from error
        self._jax, self._psa, self._gpu = jax, psa_jax, device == "gpu"
        self.dense = jax.jit(self._cudnn if self._gpu else chunked_dense)
        self.sparse = jax.jit(self._sparse, static_argnums=3)

    def array(self, x):
        dtype = self._jax.numpy.bfloat16 if self._gpu else self._jax.numpy.float32
        return self._jax.device_put(self._jax.numpy.asarray(x, dtype), self._device)

    def numpy(self, x):
        x = np.asarray(x)
        return x if np.issubdtype(x.dtype, np.integer) else x.astype(np.float32)

    def _cudnn(self, q, k, v):
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        out = self._jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
        return out.swapaxes(1, 2)

    def _sparse(self, q, k, v, config):
        return self._psa.psa_attention(q, k, v, config=config, return_levels=True)

    def wait(self, x):
        self._jax.block_until_ready(x)


def load_frameworks(device: str) -> tuple[list[Framework], list[str]]:
    """The frameworks that are installed, and a sentence for each one that is not.

    Raises:
        ImportError: none is installed; the message names the extras.
        ValueError: `device` is unknown, or a framework that is installed lacks it.
    """
    if device not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {device!r}")
    found: list[Framework] = []
    missing = []
    for kind in (Torch, Jax):
        try:
            found.append(kind(device))
        except ImportError as error:
            missing.append(f"{kind.title} is left out: {error}")
    if not found:
        raise ImportError("the demo needs at least one framework. " + " ".join(missing))
    return found, missing


def dense_levels(framework: Framework, levels: Any) -> np.ndarray:
    """Levels in either serial form as a dense NumPy array."""
    levels = framework.numpy(levels)
    return from_segments(levels) if (levels == SEPARATOR).any() else levels


def timed(framework: Framework, call: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Median seconds of `repeats` calls after one that is not counted, and that one's result."""
    result = call()
    framework.wait(result)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        framework.wait(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times), result
