"""How torch tensors meet the checks of `shared_specs.checks`, and autocast."""

import contextlib

import torch
from torch import Tensor

from shared_specs.checks import Described


def describe(name: str, x: Tensor) -> Described:
    """What the shared checks look at.

    Raises:
        TypeError: `x` is not a tensor.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    return Described(tuple(x.shape), str(x.dtype).removeprefix("torch."), str(x.device))


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as scaled_dot_product_attention would take them inside `torch.autocast`.

    In the dtype of autocast, but float64 stays; outside autocast everything stays as it is.
    """
    device = tensors[0].device.type
    # The compiler cannot ask whether a device knows autocast; what it compiles for does.
    if not torch.compiler.is_compiling() and not torch.amp.is_autocast_available(device):
        return tensors
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    eligible = (torch.float16, torch.bfloat16, torch.float32)
    return tuple(x.to(dtype) if x.dtype in eligible else x for x in tensors)


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """For the body of an operator, which chooses its own precision: autocast reaches into it."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)
