"""Deterministic inputs with the structure that sparse attention lives on.

Tokens lie on a grid; queries and keys are random Fourier features of the position, so that near
tokens are alike, plus noise; heads differ in temperature as those of the demo do. Independent
random tokens would make every block equally important, which no model's attention is.
"""

from __future__ import annotations

import numpy as np

from benchmarks.workloads import Workload

TEMPERATURES = (1.0, 1.5, 2.0, 3.0)
NOISE = 0.5
# Rows and columns of the grid that tokens fill in raster order, and the distance in tokens over
# which features stay alike.
GRID_ROWS, GRID_COLUMNS = 32, 32
REACH = 6.0


def make_inputs(workload: Workload) -> dict[str, np.ndarray]:
    """q `[1, H, L, D]`, k, v `[1, Hk, L, D]` and the output's gradient dout, float32.

    Heads beyond the fourth repeat the first four with channel signs of their own.
    """
    rng = np.random.default_rng(0)
    length, head_dim = workload.length, workload.head_dim
    cell = np.arange(length)
    plane = GRID_ROWS * GRID_COLUMNS
    position = np.stack([cell // plane, cell % plane // GRID_COLUMNS, cell % GRID_COLUMNS], 1)
    position = position.astype(np.float32) / REACH

    def field(count: int) -> np.ndarray:
        frequency = rng.standard_normal((count, 3, head_dim), dtype=np.float32)
        phase = rng.random((count, 1, head_dim), dtype=np.float32) * np.float32(2 * np.pi)
        return np.float32(np.sqrt(2)) * np.cos(position @ frequency + phase)

    def noise(x: np.ndarray) -> np.ndarray:
        return x + np.float32(NOISE) * rng.standard_normal(x.shape, dtype=np.float32)

    base = field(min(workload.kv_heads, len(TEMPERATURES)))
    group = workload.heads // workload.kv_heads
    signs = rng.choice(np.float32([-1, 1]), (workload.kv_heads, 1, head_dim))
    of_kv = np.arange(workload.kv_heads) % len(base)
    k = noise(base)[of_kv] * signs
    v = noise(field(len(base)))[of_kv] * signs
    query = (noise(base)[of_kv] * signs).repeat(group, axis=0)
    temperature = np.resize(np.float32(TEMPERATURES), workload.heads)[:, None, None]
    dout = rng.standard_normal((length, head_dim), dtype=np.float32)
    return {
        "q": (query * temperature)[None],
        "k": k[None],
        "v": v[None],
        "dout": np.broadcast_to(dout, (1, workload.heads, length, head_dim)),
    }
