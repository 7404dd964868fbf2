"""What the kernels walk: tables of visited blocks and how many of them need no mask."""

from typing import NamedTuple

import torch
from torch import Tensor

from psa_torch.kernels.table import build_plan
from shared_specs.constants import LEVELS


class Plan(NamedTuple):
    """One direction of the walk, on the device of the level mask; nothing waits for it.

    Attributes:
        entries: int32 `[B, H, rows, columns]`, block ids grouped by level, ascending inside one.
        counts: int32 `[B, H, rows, 4]`, ids of each level.
        full: int32 `[B, H, rows, 4]`, ids of each level that need no per-element mask. They
            are the first of their level when rows are query blocks, and the last when rows
            are key blocks.
    """

    entries: Tensor
    counts: Tensor
    full: Tensor


def query_plan(
    levels: Tensor, *, q_len: int, kv_len: int, block_m: int, block_n: int, is_causal: bool
) -> Plan:
    """The key blocks of each query block, for the forward and dq.

    A block needs no mask if all its keys are real and, when causal, every row of the query
    block sees all of them.

    Args:
        levels: int32 `[B, H, Nq, Nk]`.
        q_len, kv_len: queries and keys.
        block_m, block_n: queries and keys per block.
        is_causal: leave out blocks of which no key is visible.
    """
    geometry = dict(q_len=q_len, kv_len=kv_len, block_m=block_m, block_n=block_n)
    return Plan(*build_plan(levels, is_causal=is_causal, **geometry))


def key_plan(
    levels: Tensor, *, q_len: int, kv_len: int, block_m: int, block_n: int, is_causal: bool
) -> Plan:
    """The query blocks of each key block, for dk and dv.

    The transposed walk needs a mask for causality only: its pyramid rows are fixed, and those
    that cover no key are never read back.

    Args:
        levels: int32 `[B, H, Nq, Nk]`.
        q_len, kv_len: queries and keys.
        block_m, block_n: queries and keys per block.
        is_causal: leave out query blocks that see no key of the block.
    """
    geometry = dict(q_len=q_len, kv_len=kv_len, block_m=block_m, block_n=block_n)
    return Plan(*build_plan(levels, is_causal=is_causal, transposed=True, **geometry))


def key_plans(
    levels: Tensor,
    merged: tuple[int, int, int, int],
    *,
    q_len: int,
    kv_len: int,
    block_m: int,
    block_n: int,
    is_causal: bool,
) -> tuple[Plan, Plan, Plan, Plan]:
    """`key_plan` for each level, finest first, where adjacent key blocks may share a walk.

    A shared walk lists the query blocks that see any of its key blocks at that level, as the
    first group of entries. Its row `i` stands for key blocks `i * merged .. (i + 1) * merged - 1`.

    Args:
        merged: key blocks that share a walk, for each level; 1 gives the plan of all levels.
    """
    geometry = dict(q_len=q_len, kv_len=kv_len, block_m=block_m, is_causal=is_causal)
    alone = key_plan(levels, block_n=block_n, **geometry) if 1 in merged else None
    return tuple(
        alone
        if count == 1
        else key_plan(_seen_by_any(levels == level, count), block_n=block_n * count, **geometry)
        for level, count in zip(LEVELS, merged, strict=True)
    )


def _seen_by_any(seen: Tensor, count: int) -> Tensor:
    """`[..., Nk]` bool to int32 `[..., ceil(Nk / count)]`: 1 where any of `count` blocks is."""
    short = -seen.shape[-1] % count
    seen = torch.nn.functional.pad(seen, (0, short)) if short else seen
    return seen.unflatten(-1, (-1, count)).any(-1).int()
