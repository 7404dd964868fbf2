"""Pyramid and binary masks of equal cost, as configurations."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from shared_specs.config import PSAConfig
from shared_specs.constants import MASK_LEVELS


def scaled(config: PSAConfig, factor: float) -> PSAConfig:
    """The configuration with every ratio's end times `factor`, at most 1; the rest is skipped."""
    ratios, start = {}, 0.0
    for level, end in config.ratio_ends:
        end = 1.0 if level == 0 else min(1.0, end * factor)
        ratios[level] = (start, end)
        start = end
    return dataclasses.replace(config, mask_ratios=ratios)


def binary_of_equal_cost(config: PSAConfig, levels: np.ndarray) -> PSAConfig:
    """A configuration of levels 0 and 1 only, at the cost of `levels` or just above it.

    The best blocks by the same scores are kept whole. Their number per row is the mean cost of
    `levels` in whole blocks, rounded up, so the binary mask is never the cheaper of the two.

    Args:
        config: the configuration that chose `levels`.
        levels: int `[B, H, Nq, Nk]`.
    """
    blocks = levels.shape[-1]
    cost = float(np.where(levels > 0, 1.0 / np.maximum(levels, 1), 0.0).sum(-1).mean())
    kept = min(blocks, math.ceil(cost - 1e-9))
    # Half a block more than `kept` truncates to `kept` whatever the rounding of the product.
    end = min(1.0, (kept + 0.5) / blocks)
    ratios = {1: (0.0, end), 0: (end, 1.0)}
    return dataclasses.replace(config, mask_mode="topk", mask_ratios=ratios)


def level_shares(levels: np.ndarray) -> dict[int, float]:
    """Share of the blocks at each level."""
    return {level: float((levels == level).mean()) for level in MASK_LEVELS}
