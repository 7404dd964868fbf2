"""`torch.vmap` over the custom operators: the mapped axis joins the batch axis."""

from collections.abc import Callable

import torch
from torch import Tensor


def register_batch_rule(operator: torch.library.CustomOpDef) -> None:
    """Let `operator` run under vmap by folding the mapped axis into axis 0 of every tensor.

    Right for operators that treat the entries of axis 0 of all their tensors independently.
    """

    def rule(info, in_dims, *arguments):
        size = info.batch_size
        folded = [_fold(x, dim, size) for x, dim in zip(arguments, in_dims, strict=True)]
        return _each(operator(*folded), lambda x: x.unflatten(0, (size, -1)))

    operator.register_vmap(rule)


def _fold(x, dim: int | None, size: int):
    if not isinstance(x, Tensor):
        return x
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1)


def _each(outputs, unfold: Callable[[Tensor], Tensor]):
    if isinstance(outputs, Tensor):
        return unfold(outputs), 0
    return tuple(unfold(x) for x in outputs), (0,) * len(outputs)
