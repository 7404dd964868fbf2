"""What the kernels walk: tables of visited blocks and how many of them need no mask."""

from typing import NamedTuple

from torch import Tensor

from psa_torch.kernels.table import build_plan
from shared_specs.geometry import Geometry


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


def query_plan(levels: Tensor, geometry: Geometry) -> Plan:
    """The key blocks of each query block, for the forward and dq.

    A block needs no mask if all its keys are real and, when causal, every row of the query
    block sees all of them.

    Args:
        levels: int32 `[B, H, Nq, Nk]`.
        geometry: where it is causal, blocks of which no key is visible are left out.
    """
    return _plan(levels, geometry, transposed=False)


def key_plan(levels: Tensor, geometry: Geometry) -> Plan:
    """The query blocks of each key block, for dk and dv.

    The transposed walk needs a mask for causality only: its pyramid rows are fixed, and those
    that cover no key are never read back.

    Args:
        levels: int32 `[B, H, Nq, Nk]`.
        geometry: where it is causal, query blocks that see no key of the block are left out.
    """
    return _plan(levels, geometry, transposed=True)


def _plan(levels: Tensor, geometry: Geometry, transposed: bool) -> Plan:
    return Plan(
        *build_plan(
            levels,
            q_len=geometry.q_len,
            kv_len=geometry.kv_len,
            block_m=geometry.block_m,
            block_n=geometry.block_n,
            is_causal=geometry.is_causal,
            transposed=transposed,
        )
    )
