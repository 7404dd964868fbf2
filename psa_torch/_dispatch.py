"""Where the rooms run: Triton kernels for CUDA tensors, plain torch for everything else."""

import contextlib
import functools
import importlib.util
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from shared_specs.dispatch import Announcer

announce = Announcer("psa_torch")

_forced = False

MIN_CAPABILITY = (8, 0)


def use_kernels(x: Tensor) -> bool:
    """Whether the Triton kernel of a room takes `x`: tensors on an NVIDIA GPU it is built for.

    float64 is there to check gradients with, and stays with plain torch.
    """
    if x.dtype == torch.float64:
        return False
    return _forced or (x.is_cuda and _kernels_run_on(x.device.index))


@functools.cache
def _kernels_run_on(index: int) -> bool:
    against = _reason_against(index)
    if against is not None:
        rooms = "pyramid, scores, selection, table and token orders"
        announce("%s run as plain torch: %s", rooms, against, level=logging.WARNING)
    return against is None


def _reason_against(index: int) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if torch.version.hip is not None:
        return "the Triton kernels are written for NVIDIA GPUs, this is a ROCm build of torch"
    capability = torch.cuda.get_device_capability(index)
    if capability < MIN_CAPABILITY:
        needed, found = (".".join(map(str, x)) for x in (MIN_CAPABILITY, capability))
        return f"compute capability must be at least {needed}, this GPU has {found}"
    return None


def repeated(function: Callable) -> Callable:
    """Makes the body of an operator cheap to call again on a GPU (see `_triton.launch.repeat`).

    Args:
        function: depends on nothing but its arguments, of which the first is a tensor and every
            other tensor is one too, not inside of one.
    """
    plans: dict[tuple, Any] = {}

    @functools.wraps(function)
    def call(*args, **kwargs):
        if not (args[0].is_cuda and use_kernels(args[0])):
            return function(*args, **kwargs)
        return _repeat()(function, plans, args, kwargs)

    return call


@functools.cache
def _repeat() -> Callable:
    from psa_torch._triton.launch import repeat  # without Triton there are no kernels

    return repeat


@contextlib.contextmanager
def forced_kernels() -> Iterator[None]:
    """Send CPU tensors to the kernels too, for tests under the Triton interpreter."""
    global _forced
    before, _forced = _forced, True
    try:
        yield
    finally:
        _forced = before
