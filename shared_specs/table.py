"""The packed list of blocks that kernels walk (specification, section 3)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from shared_specs.constants import LEVELS


class Table(NamedTuple):
    """Block ids of each row grouped by level, and how many each level has.

    Attributes:
        entries: int32 `[B, H, Nq, Nk]`, ids by level 1, 2, 4, 8, ascending inside a level,
            -1 in unused places.
        counts: int32 `[B, H, Nq, 4]`.
    """

    entries: np.ndarray
    counts: np.ndarray


def build_table(levels: np.ndarray, *, transposed: bool = False) -> Table:
    """Table of a level mask.

    Args:
        levels: `[B, H, Nq, Nk]`, values in {0, 1, 2, 4, 8}.
        transposed: list the query blocks of each key block instead: `[B, H, Nk, Nq]` and
            `[B, H, Nk, 4]`.
    """
    if transposed:
        levels = np.swapaxes(levels, -1, -2)
    entries = np.full(levels.shape, -1, np.int32)
    counts = np.zeros((*levels.shape[:-1], len(LEVELS)), np.int32)
    for row in np.ndindex(levels.shape[:-1]):
        ids = [np.flatnonzero(levels[row] == level) for level in LEVELS]
        counts[row] = [len(group) for group in ids]
        entries[row][: counts[row].sum()] = np.concatenate(ids)
    return Table(entries, counts)
