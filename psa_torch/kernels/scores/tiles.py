"""Which score kernel a call gets and its tile sizes, by GPU and dtype. Looked up, never tuned at
run time."""

from typing import NamedTuple

import torch
from torch import Tensor

from psa_torch.kernels._launch import capability
from shared_specs.config import PSAConfig
from shared_specs.geometry import cdiv

HOPPER_ROWS = 128
"""Rows that the warp-specialised kernel takes at once, half of them for each warpgroup."""


class ScoreConfig(NamedTuple):
    """Products of `rows` by `columns`, and how they are pipelined.

    per_processor: programs per multiprocessor that registers and shared memory let run at once.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    per_processor: int


class HopperScoreConfig(NamedTuple):
    """Warp-specialised `pooled` and `sampled` scores for compute capability 9.0.

    stages: tiles of columns in flight.
    columns: key blocks of a tile. 128 are what was measured; tests take fewer.
    """

    stages: int
    columns: int = 128


HOPPER_PEAK = {64: HopperScoreConfig(stages=8), 128: HopperScoreConfig(stages=4)}
"""By head dimension."""


def peak_tile(
    q: Tensor, k: Tensor, rows_per_block: int, config: PSAConfig
) -> ScoreConfig | HopperScoreConfig:
    """Tiles of the `pooled` and `sampled` scores of a call: the warp-specialised kernel's where it
    can run.

    Args:
        q: `[B, H, Lq, D]`; k: `[B, Hk, Lk, D]`.
        rows_per_block: rows that stand for a query block.
    """
    head_dim, key_blocks = q.shape[-1], cdiv(k.shape[2], config.block_n)
    # On the CPU the interpreter plays an H100, but cannot run the warp-specialised kernel.
    if (
        q.is_cuda
        and capability(q) == (9, 0)
        and fits_hopper(q.dtype, head_dim, rows_per_block, key_blocks)
    ):
        return HOPPER_PEAK[head_dim]
    return choose_peak(capability(q), head_dim, q.dtype, config.causal)


def fits_hopper(dtype: torch.dtype, head_dim: int, rows_per_block: int, key_blocks: int) -> bool:
    """Whether the warp-specialised kernel takes such a call.

    Each half of its rows must be whole query blocks, and with few key blocks most of its columns
    would be empty.
    """
    tile = HOPPER_PEAK.get(head_dim)
    if dtype == torch.float32 or tile is None:
        return False
    return rows_per_block <= HOPPER_ROWS // 2 and key_blocks >= tile.columns


def choose_peak(
    capability: tuple[int, int], head_dim: int, dtype: torch.dtype, is_causal: bool
) -> ScoreConfig:
    """Tiles of the kernel that runs on every GPU; `dtype` is that of the rows multiplied.

    On Hopper as measured (`docs/log/scores.md`): 64 columns leave registers for a second program,
    whose products run while the first one takes maxima; short rows, and the masked loop of a
    causal call, do better with one larger tile.
    """
    if dtype == torch.float32:
        return ScoreConfig(rows=64, columns=32, warps=8, stages=2, per_processor=1)
    if capability[0] != 9:
        return ScoreConfig(rows=128, columns=64, warps=8, stages=2, per_processor=1)
    if head_dim <= 64:
        return ScoreConfig(rows=128, columns=128, warps=8, stages=3, per_processor=1)
    if is_causal:
        return ScoreConfig(rows=256, columns=64, warps=8, stages=3, per_processor=1)
    per_processor = 2 if head_dim <= 128 else 1
    return ScoreConfig(rows=128, columns=64, warps=8, stages=3, per_processor=per_processor)


def choose_antidiagonal(capability: tuple[int, int], dtype: torch.dtype) -> ScoreConfig:
    """Tiles of the `antidiagonal` scores, whose operands stream from L2: the wider the better."""
    if dtype == torch.float32:
        return ScoreConfig(rows=64, columns=64, warps=8, stages=2, per_processor=1)
    if capability[0] < 9:
        return ScoreConfig(rows=128, columns=128, warps=8, stages=3, per_processor=1)
    return ScoreConfig(rows=128, columns=256, warps=8, stages=3, per_processor=1)
