"""What every launch in this package needs: the right device, sizes and a grid."""

import contextlib
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

# Programs in flight when there is no GPU to ask; small, so that the interpreter's tests make one
# program work on several items.
_INTERPRETER_PROGRAMS = 3


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Kernels launch on the current device: make it that of `x`."""
    # By number: torch takes four times as long to read it out of a device.
    return torch.cuda.device(x.get_device()) if x.is_cuda else contextlib.nullcontext()


def next_power_of_2(x: int) -> int:
    """Least power of two that is at least `x`, from 1 up.

    Triton's own, and its `cdiv`, are for kernels too, which makes them 20 times slower here.
    """
    return 1 << (x - 1).bit_length()


def padded_head_dim(head_dim: int) -> int:
    """Width of a head in registers: a power of two that `tl.dot` accepts."""
    return max(16, next_power_of_2(head_dim))


def capability(x: Tensor) -> tuple[int, int]:
    """Compute capability of the device of `x`; the interpreter plays an H100."""
    return _capability(x.get_device()) if x.is_cuda else (9, 0)


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def resident_programs(x: Tensor, per_processor: int) -> int:
    """Programs that fill the device of `x` once."""
    if not x.is_cuda:
        return _INTERPRETER_PROGRAMS
    return _processors(x.get_device()) * per_processor


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def require_dtype(name: str, x: Tensor, accepted: tuple[torch.dtype, ...]) -> None:
    """Raise TypeError unless the dtype of `x` is one the kernel computes in."""
    if x.dtype not in accepted:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in accepted)
        raise TypeError(f"{name} must be {names} for a Triton kernel, got {x.dtype}")


@triton.jit
def max_inner(x, OUTER: tl.constexpr, INNER: tl.constexpr, WIDTH: tl.constexpr):
    """`[OUTER * INNER, WIDTH]` to `[OUTER, WIDTH]`, maxima over INNER."""
    if INNER == 1:
        reduced = x
    else:
        reduced = tl.max(tl.reshape(x, (OUTER, INNER, WIDTH)), 1)
    return reduced


@triton.jit
def sum_inner(x, OUTER: tl.constexpr, INNER: tl.constexpr, WIDTH: tl.constexpr):
    """`[OUTER * INNER, WIDTH]` to `[OUTER, WIDTH]`, sums over INNER."""
    if INNER == 1:
        reduced = x
    else:
        reduced = tl.sum(tl.reshape(x, (OUTER, INNER, WIDTH)), 1)
    return reduced
