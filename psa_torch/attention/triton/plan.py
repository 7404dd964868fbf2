"""What the kernels walk: tables of visited blocks and how many of them need no mask."""

from typing import Any, NamedTuple

from torch import Tensor

from psa_torch.kernels.table import build_plan


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
    geometry: dict[str, Any] = dict(q_len=q_len, kv_len=kv_len, block_m=block_m, block_n=block_n)
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
    geometry: dict[str, Any] = dict(q_len=q_len, kv_len=kv_len, block_m=block_m, block_n=block_n)
    return Plan(*build_plan(levels, is_causal=is_causal, transposed=True, **geometry))
