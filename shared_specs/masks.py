"""Serial forms of a level mask and its density (specification, sections 3 and 9)."""

from __future__ import annotations

import numpy as np

from shared_specs.constants import MASK_LEVELS

SEPARATOR = -1
"""Closes each of the five segments of a row."""


def to_segments(levels: np.ndarray, scores: np.ndarray | None = None) -> np.ndarray:
    """Dense levels to `new_mask_type`.

    Args:
        levels: int `[..., Nq, Nk]`, values in {0, 1, 2, 4, 8}.
        scores: `[..., Nq, Nk]`; with them the ids of a segment stand by descending score (ties
            to the lower id, NaN last), without by ascending id.

    Returns:
        int32 `[..., Nq, Nk + 5]`: block ids of levels 1, 2, 4, 8, 0, each segment closed by -1.
    """
    check_levels(levels)
    if scores is not None and scores.shape != levels.shape:
        raise ValueError(f"scores must have the shape of levels {levels.shape}, got {scores.shape}")
    n = levels.shape[-1]
    segments = np.empty((*levels.shape[:-1], n + len(MASK_LEVELS)), np.int32)
    for row in np.ndindex(levels.shape[:-1]):
        order = np.arange(n)
        if scores is not None:
            order = np.argsort(-np.nan_to_num(scores[row], nan=-np.inf), kind="stable")
        parts = []
        for level in MASK_LEVELS:
            parts += [order[levels[row][order] == level], [SEPARATOR]]
        segments[row] = np.concatenate(parts)
    return segments


def from_segments(segments: np.ndarray) -> np.ndarray:
    """`new_mask_type` to dense levels, int32 `[..., Nq, Nk]`.

    Raises:
        ValueError: a row does not hold five closed segments that name every block once.
    """
    segments = np.asarray(segments)
    if not np.issubdtype(segments.dtype, np.integer):
        raise TypeError(f"segments must be integers, got {segments.dtype}")
    n = segments.shape[-1] - len(MASK_LEVELS) if segments.ndim else 0
    if n < 1:
        raise ValueError(f"segments must be [..., Nq, Nk + 5] with Nk >= 1, got {segments.shape}")
    levels = np.empty((*segments.shape[:-1], n), np.int32)
    for row in np.ndindex(segments.shape[:-1]):
        line = segments[row]
        closed = np.flatnonzero(line == SEPARATOR)
        if len(closed) != len(MASK_LEVELS) or closed[-1] != len(line) - 1:
            raise ValueError(
                f"segments{list(row)} must be five segments each closed by -1, with the last "
                f"-1 at the end; found -1 at places {closed.tolist()} of {len(line)}"
            )
        ids = line[line != SEPARATOR]
        if not np.array_equal(np.sort(ids), np.arange(n)):
            raise ValueError(
                f"segments{list(row)} must name each block id 0..{n - 1} once, got {ids.tolist()}"
            )
        lengths = np.diff(closed, prepend=-1) - 1
        levels[row][ids] = np.repeat(MASK_LEVELS, lengths)
    return levels


def check_levels(levels: np.ndarray) -> None:
    """Raise unless `levels` is an integer array with values in {0, 1, 2, 4, 8}."""
    if not isinstance(levels, np.ndarray) or not np.issubdtype(levels.dtype, np.integer):
        raise TypeError(f"levels must be an integer array, got {getattr(levels, 'dtype', levels)}")
    wrong = ~np.isin(levels, MASK_LEVELS)
    if wrong.any():
        raise ValueError(
            f"levels must be 0, 1, 2, 4 or 8, got {levels[wrong][0]} at "
            f"{np.argwhere(wrong)[0].tolist()}"
        )


def density(
    levels: np.ndarray, *, candidates: np.ndarray | None = None, rest_share: float = 0.0
) -> float:
    """Mean of 1/level (`rest_share` at level 0) over the candidate blocks (section 9).

    Args:
        levels: int `[..., Nq, Nk]`.
        candidates: int `[Nq]`, the leading blocks of each row that can be seen at all (see
            `selection.candidate_blocks`); None means all of them.
        rest_share: of a block of level 0, `PSAConfig.rest_share`: 0 for rest='skip', `1 / block_n`
            for rest='mean'.
    """
    check_levels(levels)
    cost = np.where(levels > 0, 1.0 / np.maximum(levels, 1), rest_share)
    if candidates is None:
        return float(cost.mean())
    seen = np.arange(levels.shape[-1]) < np.asarray(candidates)[:, None]
    total = seen.sum() * np.prod(levels.shape[:-2])
    return float((cost * seen).sum() / total) if total else 0.0
