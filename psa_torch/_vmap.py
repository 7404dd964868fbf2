"""`torch.vmap` over the custom operators: the mapped axis joins the batch axis."""

from collections.abc import Callable
from typing import Any

from torch import Tensor


def register_batch_rule(operator: Any) -> None:
    """Let `operator` run under vmap by folding the mapped axis into axis 0 of every tensor.

    Right for operators that treat the entries of axis 0 of all their tensors independently.
    """
    operator.register_vmap(batch_rule(operator))


def batch_rule(function: Callable) -> Callable:
    """The vmap rule of `register_batch_rule`, for any function over tensors with a batch axis."""

    def rule(info, in_dims, *arguments):
        size = info.batch_size
        folded = [fold(x, dim, size) for x, dim in zip(arguments, in_dims, strict=True)]
        return _each(function(*folded), lambda x: x.unflatten(0, (size, -1)))

    return rule


def fold(x, dim: int | None, size: int):
    """`x` with the mapped axis, at `dim` or nowhere, in front of axis 0 and joined to it."""
    if not isinstance(x, Tensor):
        return x
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1)


def _each(outputs, unfold: Callable[[Tensor], Tensor]):
    if isinstance(outputs, Tensor):
        return unfold(outputs), 0
    return tuple(unfold(x) for x in outputs), (0,) * len(outputs)
