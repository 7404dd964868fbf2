"""Calls that are just what they look like, and what they can do without.

A custom operator lets compilers, transforms and modes see a call as one piece. It costs the host 25
microseconds, 50 to 90 with a gradient, so where none of them looks the function it was made of
is called instead.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_PLAIN = (Tensor, torch.nn.Parameter)


class _Recording(threading.local):
    """Attributes:
    recorder: the mode of this thread that writes launches down (`_triton.recording`), or None.
    is_far: whether they are for memory that may lie anywhere, so that nothing may depend on how far
        one piece is from another.
    """

    recorder: Any = None
    is_far: bool = False


recording = _Recording()


def is_eager(*tensors: Any) -> bool:
    """Whether nothing traces, transforms or watches what is done with these tensors.

    Arguments of other types count as plain.
    """
    if torch.compiler.is_compiling():
        return False
    for x in tensors:
        if type(x) not in _PLAIN and isinstance(x, Tensor):
            return False
    return (
        (not torch._C._len_torch_dispatch_stack() or recording.recorder is not None)
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None
    )


def eager(operator: Any) -> Callable:
    """`operator`, or in an eager call the function it was made of.

    For operators without a gradient: nobody else asks whether one is wanted.
    """
    body = operator._init_fn

    def call(*args):
        return body(*args) if is_eager(*args) else operator(*args)

    return call


def wants_gradient(*tensors: Tensor) -> bool:
    """Whether autograd records what is done with these tensors."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
