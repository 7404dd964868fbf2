"""Fixed offsets of the sampled importance estimator (specification, section 5)."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np


@functools.lru_cache(maxsize=64)
def _offsets(block: int, count: int, seed: int) -> np.ndarray:
    raw = np.random.Philox(key=seed).random_raw(block)
    # lexsort's last key is the primary one: by output, equal outputs by position.
    order = np.lexsort((np.arange(block), raw))
    offsets = np.sort(order[:count]).astype(np.int32)
    offsets.flags.writeable = False
    return offsets


@dataclasses.dataclass(frozen=True)
class SamplePlan:
    """Which `count` of a block's `block` positions are sampled, the same for every block.

    The positions come from the raw Philox stream, which NumPy keeps stable across versions,
    and are constants to every framework.
    """

    block: int
    count: int
    seed: int

    def __post_init__(self) -> None:
        if not 1 <= self.count <= self.block:
            raise ValueError(f"count must be in 1..{self.block}, got {self.count}")

    @property
    def offsets(self) -> np.ndarray:
        """Ascending positions inside a block, int32 `[count]`, read-only."""
        return _offsets(self.block, self.count, self.seed)
