"""Where the rooms run: Triton kernels for CUDA tensors, plain torch for everything else."""

import contextlib
import functools
import importlib.util
import logging
from collections.abc import Iterator

import torch
from torch import Tensor

logger = logging.getLogger("psa_torch")

_forced = False


def use_kernels(x: Tensor) -> bool:
    """Whether the Triton kernel of a room takes `x`: CUDA tensors, with Triton installed.

    float64 is there to check gradients with, and stays with plain torch.
    """
    if x.dtype == torch.float64:
        return False
    return _forced or (x.is_cuda and _triton_installed())


@functools.cache
def _triton_installed() -> bool:
    found = importlib.util.find_spec("triton") is not None
    if not found:
        logger.warning("triton is not installed: pyramid, scores and selection use plain torch")
    return found


@contextlib.contextmanager
def forced_kernels() -> Iterator[None]:
    """Send CPU tensors to the kernels too, for tests under the Triton interpreter."""
    global _forced
    before, _forced = _forced, True
    try:
        yield
    finally:
        _forced = before
