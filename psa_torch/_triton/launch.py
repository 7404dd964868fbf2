"""How kernels are launched: by Triton the first times, by a repeated recording from then on.

Of a launch on a GPU most of the host's time is Triton's: it looks at every argument to find out
which compiled kernel is meant. For calls alike in all that this depends on the answer is the same,
and so is everything else about the call but where its memory lies.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from psa_torch._eager import recording
from psa_torch._triton.direct import Distance, is_watched, launches_of_this_thread
from psa_torch._triton.recording import ALIGNMENT, Plan, Recorder

__all__ = ["Distance", "launch_kernel", "repeat"]

MAX_CALLS = 4096
"""Kinds of calls that are remembered for one function; then it starts anew."""

_SEEN, _NEVER = object(), object()


def launch_kernel(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """`kernel[grid](*args, **options)`, which a recording sees.

    Args:
        kernel: a Triton or Gluon kernel.
        args: its run-time arguments. A `Distance` is passed as a plain number.
        options: its constants, and `num_warps` and so on.
    """
    plain = [int(x) if type(x) is Distance else x for x in args]
    compiled = kernel[grid](*plain, **options)
    if recording.recorder is not None:
        recording.recorder.launched(kernel, compiled, grid, args, options)


def repeat(function: Callable, plans: dict[tuple, Any], args: tuple, kwargs: dict) -> Any:
    """`function(*args, **kwargs)`, by the launches in `plans` if such a call is there.

    Of two calls alike (in shapes, strides, dtypes, device and alignment of all tensors, and in
    everything else they are given) the second is recorded and later ones repeat its launches. What
    does more than allocate and launch kernels runs as it is.
    """
    tensors: list[Tensor] = []
    pieces: list[int] = []
    key: list[Any] = []
    for x in args if not kwargs else (*args, *kwargs.items()):
        kind = type(x)
        if kind is Tensor:
            pointer = x.data_ptr()
            tensors.append(x)
            pieces.append(pointer)
            key += (x.shape, x.stride(), x.dtype, x.get_device(), pointer % ALIGNMENT)
        elif isinstance(x, Tensor) or kind is tuple and isinstance(x[-1], Tensor):
            return function(*args, **kwargs)
        else:
            key += (kind, x)
    key = tuple(key)
    found = plans.get(key)
    # Of two inputs at one place it would not be known which one a launch meant.
    if found is _NEVER or len(set(pieces)) < len(pieces) or _is_observed():
        return function(*args, **kwargs)
    if type(found) is Plan:
        done, result = found.run(tensors, pieces.copy())
        if not done and found.elsewhere is None:
            result, found.elsewhere = _record(function, tensors, args, kwargs, is_far=True)
            return result
        if not done and type(found.elsewhere) is Plan:
            done, result = found.elsewhere.run(tensors, pieces)
        return result if done else function(*args, **kwargs)
    if found is None:
        if len(plans) >= MAX_CALLS:
            plans.clear()
        plans[key] = _SEEN
        return function(*args, **kwargs)
    result, plans[key] = _record(function, tensors, args, kwargs)
    return result


def _record(
    function: Callable, tensors: list[Tensor], args: tuple, kwargs: dict, *, is_far: bool = False
) -> tuple[Any, Any]:
    """What the call returns, and its plan or `_NEVER`."""
    recorder = Recorder(tensors)
    recording.recorder, recording.is_far = recorder, is_far
    try:
        with launches_of_this_thread() as made, recorder:
            result = function(*args, **kwargs)
    finally:
        recording.recorder, recording.is_far = None, False
    return result, recorder.plan(result, len(made)) or _NEVER


def _is_observed() -> bool:
    """Whether more is to be seen of a call than its result: it is recorded itself, a mode of
    PyTorch looks at what it does, or somebody watches launches."""
    return (
        recording.recorder is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or is_watched()
    )
