"""How torch tensors meet the checks of `shared_specs.checks`, and autocast."""

import contextlib
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from psa_torch._eager import is_eager
from shared_specs.checks import Described, check_levels_shape, check_qkv


def require_tensor(name: str, x: Tensor) -> None:
    """Raise TypeError unless `x` is a tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")


def describe(name: str, x: Tensor) -> Described:
    """What the shared checks look at.

    Raises:
        TypeError: `x` is not a tensor.
    """
    require_tensor(name, x)
    return Described(tuple(x.shape), _name(x.dtype), str(x.device))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Inputs(NamedTuple):
    """q, k and v, and what the shared checks look at of each."""

    tensors: tuple[Tensor, Tensor, Tensor]
    sizes: tuple[Described, Described, Described]


def checked_inputs(q: Tensor, k: Tensor, v: Tensor) -> Inputs:
    """q, k and v as `autocast` has them, once they fit each other.

    Raises:
        TypeError, ValueError: as `check_qkv` says, or one is not a tensor.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        require_tensor(name, x)
    q, k, v = autocast(q, k, v)
    tensors = q, k, v
    # Kept where sizes are plain numbers and no compiler looks on: they took a tenth of a call.
    check = _checked_sizes if is_eager(*tensors) else _checked_sizes.__wrapped__
    return Inputs(tensors, check(*((x.shape, x.dtype, x.device) for x in tensors)))


@functools.lru_cache(maxsize=1024)
def _checked_sizes(*facts: tuple) -> tuple[Described, Described, Described]:
    sizes = tuple(
        Described(tuple(shape), _name(dtype), str(device)) for shape, dtype, device in facts
    )
    # A batch of nothing is as good as any other if the rest fits.
    empty = all(len(x.shape) == 4 and x.shape[0] == 0 for x in sizes)
    check_qkv(*(x._replace(shape=(1, *x.shape[1:])) if empty else x for x in sizes))
    q, k, v = sizes
    return q, k, v


def levels_form(levels: Tensor, inputs: Inputs, *, block_m: int, block_n: int) -> str:
    """Which serial form `levels` has for these inputs, from its shape: 'dense' or 'segments'.

    Raises:
        TypeError, ValueError: as `check_levels_shape` says.
    """
    find = _levels_form if is_eager(levels, *inputs.tensors) else _levels_form.__wrapped__
    return find(levels.shape, levels.dtype, levels.device, *inputs.sizes[:2], block_m, block_n)


@functools.lru_cache(maxsize=1024)
def _levels_form(shape, dtype, device, q: Described, k: Described, block_m, block_n) -> str:
    levels = Described(tuple(shape), _name(dtype), str(device))
    return check_levels_shape(levels, q, k, block_m=block_m, block_n=block_n)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as scaled_dot_product_attention would take them inside `torch.autocast`.

    In the dtype of autocast, but float64 stays; outside autocast everything stays as it is.
    """
    device = tensors[0].device.type
    if not _is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    eligible = (torch.float16, torch.bfloat16, torch.float32)
    return tuple(x.to(dtype) if x.dtype in eligible else x for x in tensors)


def absorb_scale(q: Tensor, scale: Any) -> tuple[Tensor, Any]:
    """q and the number that is left of `scale`: a tensor is multiplied into q, which keeps its
    gradient; anything else is for the checks of numbers to judge.

    Args:
        q: `[B, H, Lq, D]`.
        scale: a floating tensor, 0-d or `[H]`, on the device of q; or anything else.

    Raises:
        TypeError: a tensor that is not floating.
        ValueError: a tensor of another shape or device.
    """
    if not isinstance(scale, Tensor):
        return q, scale
    if not scale.is_floating_point():
        raise TypeError(f"scale must be a number or a floating tensor, got {scale.dtype}")
    heads = q.shape[1]
    if scale.ndim > 1 or (scale.ndim == 1 and scale.shape[0] != heads):
        raise ValueError(
            f"scale must be a number, or a tensor of shape () or [H] = ({heads},), "
            f"got shape {tuple(scale.shape)}"
        )
    if scale.device != q.device and scale.ndim:
        raise ValueError(f"scale must be on the device of q, {q.device}, got {scale.device}")
    # At the precision of scale, rounded once to that of q.
    factor = scale[:, None, None] if scale.ndim else scale
    return (q.to(torch.promote_types(q.dtype, scale.dtype)) * factor).to(q.dtype), 1.0


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """For the body of an operator, which chooses its own precision: autocast reaches into it."""
    device = x.device.type
    if not _is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


def _is_autocast_enabled(device: str) -> bool:
    # The compiler cannot ask whether a device knows autocast; what it compiles for does.
    if not torch.compiler.is_compiling() and not torch.amp.is_autocast_available(device):
        return False
    return torch.is_autocast_enabled(device)
