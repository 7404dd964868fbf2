"""Tile sizes of the score kernels by GPU and dtype. Looked up, never tuned at run time."""

from typing import NamedTuple

import torch


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
    """Warp-specialised `pooled` and `sampled` scores: 128 rows by 128 key blocks.

    slots: tiles of columns in flight.
    rows, columns, per_processor: as in `ScoreConfig`; the kernel has no other.
    multiply_registers, copy_registers: per thread of each role, multiples of 8; two multiplying
        warpgroups and one that copies and makes scores share 504.
    """

    slots: int
    rows: int = 128
    columns: int = 128
    multiply_registers: int = 224
    copy_registers: int = 56
    per_processor: int = 1


HOPPER_PEAK = {64: HopperScoreConfig(slots=8), 128: HopperScoreConfig(slots=4)}
"""By head dimension."""


def choose_peak(
    capability: tuple[int, int], head_dim: int, dtype: torch.dtype, is_causal: bool
) -> ScoreConfig:
    """Tiles of the `pooled` and `sampled` scores; `dtype` is that of the rows multiplied.

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
