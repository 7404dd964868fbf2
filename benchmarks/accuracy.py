"""Whether a provider computes what it claims: spot checks against the float64 oracle."""

from __future__ import annotations

import numpy as np

from benchmarks.workloads import Workload
from shared_specs.attention import sparse_attention

# Largest relative error (norm over norm) of a spot that still counts as right. A speed is
# published only for rows within it.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def spot_heads(workload: Workload) -> list[int]:
    """Heads that are looked at: the first, one in the middle, the last."""
    return sorted({0, workload.heads // 2, workload.heads - 1})


def expected_spots(
    inputs: dict[str, np.ndarray],
    levels: np.ndarray | None,
    block_n: int | None,
    workload: Workload,
) -> list[tuple[int, int, np.ndarray]]:
    """The oracle's outputs of three query blocks of each of `spot_heads`.

    Args:
        inputs: q, k, v as the provider read them (rounded to its dtype), all heads.
        levels: int `[1, H, Nq, Nk]`, or None for dense.
        block_n: keys per block of `levels`.
        workload: shapes, block_m, causal.

    Returns:
        (index into `spot_heads`, first row, output `[rows, D]`) of each spot.
    """
    rows = -(-workload.length // workload.config.block_m)
    return [
        (
            index,
            row * workload.config.block_m,
            _expected(inputs, levels, block_n, workload, head, row),
        )
        for index, head in enumerate(spot_heads(workload))
        for row in sorted({0, rows // 2, rows - 1})
    ]


def spot_error(out: np.ndarray, expected: list[tuple[int, int, np.ndarray]]) -> float:
    """Largest relative error of a spot; infinite where one is not finite.

    Args:
        out: the provider's output for `spot_heads`, `[1, heads, L, D]`.
        expected: from `expected_spots`.
    """
    errors = [
        relative_difference(out[0, index, start : start + len(rows)], rows)
        for index, start, rows in expected
    ]
    return max(error if np.isfinite(error) else float("inf") for error in errors)


def _expected(inputs, levels, block_n, workload, head, row) -> np.ndarray:
    """The oracle's output of one query block of one head, `[rows, D]`."""
    config = workload.config
    block_n = block_n or config.block_n
    start, stop = row * config.block_m, min((row + 1) * config.block_m, workload.length)
    # A causal row block sees no key after its own last row; cut there, its last query sees the
    # last key, as the oracle has it. Blocks that the cut goes through are at level 1.
    seen = stop if config.causal else workload.length
    kv_head = head // (workload.heads // workload.kv_heads)
    q = inputs["q"][:, head : head + 1, start:stop]
    k, v = (inputs[name][:, kv_head : kv_head + 1, :seen] for name in ("k", "v"))
    blocks = -(-seen // block_n)
    if levels is None:
        mask = np.ones((1, 1, 1, blocks), np.int32)
    else:
        mask = levels[:, head : head + 1, row : row + 1, :blocks]
    out = sparse_attention(
        q,
        k,
        v,
        mask,
        block_m=config.block_m,
        block_n=block_n,
        scale=config.scale,
        is_causal=config.causal,
        rest=config.rest,
    )
    return out[0, 0]


def relative_difference(x: np.ndarray, y: np.ndarray) -> float:
    """Norm of the difference over the norm of `y`."""
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))
