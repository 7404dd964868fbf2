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


def choose_peak(
    capability: tuple[int, int], head_dim: int, dtype: torch.dtype, is_causal: bool
) -> ScoreConfig:
    """Tiles of the `pooled` and `sampled` scores; `dtype` is that of the rows multiplied.

    64 columns leave registers for a second program, whose products run while the first one
    reduces its tile; the masked loop of a causal call needs more of them, hence fewer warps.
    """
    if dtype == torch.float32:
        columns = 32 if is_causal else 64
        return ScoreConfig(rows=64, columns=columns, warps=8, stages=2, per_processor=1)
    if capability[0] < 9:
        return ScoreConfig(rows=128, columns=64, warps=8, stages=2, per_processor=1)
    if is_causal:
        return ScoreConfig(rows=128, columns=64, warps=4, stages=2, per_processor=2)
    per_processor = 2 if head_dim <= 128 else 1
    return ScoreConfig(rows=128, columns=64, warps=8, stages=3, per_processor=per_processor)


def choose_antidiagonal(capability: tuple[int, int], dtype: torch.dtype) -> ScoreConfig:
    """Tiles of the `antidiagonal` scores, whose operands stream from L2: the wider the better."""
    if dtype == torch.float32:
        return ScoreConfig(rows=64, columns=64, warps=8, stages=2, per_processor=1)
    if capability[0] < 9:
        return ScoreConfig(rows=128, columns=128, warps=8, stages=3, per_processor=1)
    return ScoreConfig(rows=128, columns=256, warps=8, stages=3, per_processor=1)
