"""The packed list of blocks that kernels walk (specification, section 3)."""

from typing import NamedTuple

import torch
from torch import Tensor

from psa_torch._dispatch import repeated, use_kernels
from psa_torch._vmap import register_batch_rule
from shared_specs.constants import LEVELS


class Table(NamedTuple):
    """Block ids of each row grouped by level, and how many each level has.

    Attributes:
        entries: int32 `[B, H, Nq, Nk]`, ids by level 1, 2, 4, 8, ascending inside a level,
            -1 in unused places. Contiguous.
        counts: int32 `[B, H, Nq, 4]`. Contiguous.
    """

    entries: Tensor
    counts: Tensor


def build_table(levels: Tensor, *, transposed: bool = False) -> Table:
    """Table of a level mask, without host synchronisation.

    Args:
        levels: integer `[B, H, Nq, Nk]`; values other than 1, 2, 4, 8 mean skip.
        transposed: list the query blocks of each key block instead: `[B, H, Nk, Nq]` and
            `[B, H, Nk, 4]`.
    """
    return Table(*_build_table(levels, transposed))


@torch.library.custom_op("psa::build_table", mutates_args=())
@repeated
def _build_table(levels: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    if use_kernels(levels):
        from psa_torch.kernels import table

        return table.build_table(levels, transposed)
    if transposed:
        levels = levels.transpose(-1, -2)
    skip = len(LEVELS)
    group = torch.full_like(levels, skip, dtype=torch.uint8, memory_format=torch.contiguous_format)
    for place, level in enumerate(LEVELS):
        group.masked_fill_(levels == level, place)
    ids = group.argsort(dim=-1, stable=True)
    counts = torch.stack([(group == place).sum(-1) for place in range(skip)], -1)
    used = torch.arange(ids.shape[-1], device=ids.device) < counts.sum(-1, keepdim=True)
    return ids.masked_fill(~used, -1).int().contiguous(), counts.int()


@_build_table.register_fake
def _(levels, transposed):
    b, h, nq, nk = levels.shape
    rows, columns = (nk, nq) if transposed else (nq, nk)
    return (
        levels.new_empty(b, h, rows, columns, dtype=torch.int32),
        levels.new_empty(b, h, rows, len(LEVELS), dtype=torch.int32),
    )


register_batch_rule(_build_table)
