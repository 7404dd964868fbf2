"""Whether a derivative is taken in a way that the registration of the operators cannot serve.

What `torch.library` makes of a gradient refuses `torch.func.grad`, and drops the tangents of
forward mode without a word. Operators that are differentiable look here first.
"""

import torch
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Inside a `torch.func` transform, or a level of forward-mode differentiation."""
    return torch._C._are_functorch_transforms_active() or is_forward_mode()


def is_forward_mode() -> bool:
    """Inside a level of forward-mode differentiation."""
    return forward_ad._current_level >= 0
