"""What the kernels walk: tables of visited blocks and how many of them need no mask.

Everything here is small tensor work on the device of the level mask; nothing waits for it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from psa_torch.table import build_table
from shared_specs.constants import LEVELS


class Plan(NamedTuple):
    """One direction of the walk.

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
    ragged = kv_len % block_n != 0
    if is_causal:
        levels = _visible(levels, q_len, kv_len, block_m, block_n)
    entries, counts = build_table(levels)
    if not is_causal and not ragged:
        return Plan(entries, counts, counts)
    query_blocks, key_blocks = _block_ids(levels)
    whole = key_blocks < kv_len // block_n
    if is_causal:
        first_position = query_blocks[:, None] * block_m + kv_len - q_len
        whole = whole & ((key_blocks + 1) * block_n - 1 <= first_position)
        return Plan(entries, counts, _count(levels * whole, -1))
    return Plan(entries, counts, counts - _count(levels[..., -1:], -1))


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
    if not is_causal:
        entries, counts = build_table(levels, transposed=True)
        return Plan(entries, counts, counts)
    levels = _visible(levels, q_len, kv_len, block_m, block_n)
    entries, counts = build_table(levels, transposed=True)
    query_blocks, key_blocks = _block_ids(levels)
    last_key = ((key_blocks + 1) * block_n).clamp(max=kv_len) - 1
    whole = last_key <= query_blocks[:, None] * block_m + kv_len - q_len
    return Plan(entries, counts, _count(levels * whole, -2))


def _block_ids(levels: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(
        torch.arange(n, dtype=torch.int32, device=levels.device) for n in levels.shape[-2:]
    )


def _visible(levels: Tensor, q_len: int, kv_len: int, block_m: int, block_n: int) -> Tensor:
    """The level mask without the blocks that causality hides from the whole query block."""
    query_blocks, key_blocks = _block_ids(levels)
    last_row = ((query_blocks + 1) * block_m).clamp(max=q_len) - 1
    return levels * (key_blocks * block_n <= last_row[:, None] + kv_len - q_len)


def _count(levels: Tensor, dim: int) -> Tensor:
    """How often each level occurs along `dim`, `[..., 4]`."""
    return torch.stack([(levels == level).sum(dim, dtype=torch.int32) for level in LEVELS], -1)
