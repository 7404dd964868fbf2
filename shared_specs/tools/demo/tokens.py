"""Attention inputs made from frames: what a video model's tokens look like, without its weights.

Patches become half-whitened principal components (neighbouring patches stay alike, as features
of a trained network do, and no single component drowns the rest); random projections make heads;
queries and keys get layer norm and 3-D rotary positions; heads differ in temperature, so that
some attend widely and some sharply. NumPy only and deterministic.
"""

from __future__ import annotations

import numpy as np

COMPONENTS = 128
TEMPERATURES = (1.0, 1.5, 2.0, 3.0)
ROTARY_BASE = 100.0
# How far the key projection of a head departs from its query projection.
KEY_DEPARTURE = 0.5

Grid = tuple[int, int, int]


def video_tokens(
    frames: np.ndarray, *, patch: int = 16, heads: int = 8, head_dim: int = 64, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Grid]:
    """Queries, keys and values of the patches of a clip.

    Args:
        frames: float32 `[T, height, width, 3]`, sides multiples of `patch`.
        patch: side of a patch in pixels.
        heads: number of heads; head i has temperature `TEMPERATURES[i % 4]`.
        head_dim: channels per head, even and at least 8.
        seed: seed of the projections.

    Returns:
        q, k, v, float32 `[1, heads, L, head_dim]` with `L = T * rows * columns` in raster order,
        and the grid (depth, height, width) in tokens.
    """
    features, grid = _features(frames, patch)
    rng = np.random.default_rng(seed)
    width = features.shape[1]

    def projection() -> np.ndarray:
        weights = rng.standard_normal((heads, width, head_dim), dtype=np.float32)
        return weights / np.float32(np.sqrt(width))

    to_q, to_v = projection(), projection()
    to_k = to_q + np.float32(KEY_DEPARTURE) * projection()
    temperature = np.resize(np.array(TEMPERATURES, np.float32), heads)[:, None, None]
    q = _rotate(_layer_norm(features @ to_q), grid) * temperature
    k = _rotate(_layer_norm(features @ to_k), grid)
    return q[None], k[None], (features @ to_v)[None], grid


def _features(frames: np.ndarray, patch: int) -> tuple[np.ndarray, Grid]:
    depth, height, width, channels = frames.shape
    rows, columns = height // patch, width // patch
    patches = frames.reshape(depth, rows, patch, columns, patch, channels)
    patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(depth * rows * columns, -1)
    patches = patches - patches.mean(0)
    variance, directions = np.linalg.eigh(patches.T @ patches)
    kept = min(COMPONENTS, len(variance))
    variance = np.maximum(variance[::-1][:kept], 1e-6)
    directions = directions[:, ::-1][:, :kept]
    # eigh leaves the sign of a direction open; fix it, so that every machine has the same tokens.
    largest = np.abs(directions).argmax(0)
    directions = directions * np.sign(directions[largest, np.arange(kept)])
    features = (patches @ directions) / variance**0.25
    return (features / features.std()).astype(np.float32), (depth, rows, columns)


def _layer_norm(x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)


def _rotate(x: np.ndarray, grid: Grid) -> np.ndarray:
    """Rotary positions: a share of the channel pairs turns with depth, height and width each."""
    positions = np.stack(np.unravel_index(np.arange(np.prod(grid)), grid))
    pairs = x.shape[-1] // 2
    shares = np.array_split(np.arange(pairs), 3)
    angles = np.concatenate(
        [
            position[:, None] * ROTARY_BASE ** (-np.arange(len(share)) / len(share))
            for position, share in zip(positions, shares, strict=True)
        ],
        axis=1,
    ).astype(np.float32)
    cosine, sine = np.cos(angles), np.sin(angles)
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = np.stack([even * cosine - odd * sine, even * sine + odd * cosine], -1)
    return turned.reshape(x.shape)
