"""Deterministic k-means over tokens, the rule every framework follows (specification, section 8).

Lloyd's algorithm, with nothing left to chance: the initial centroids are evenly spaced tokens, the
number of steps is fixed, a token at equal distance from two centroids takes the lower one, and a
centroid that no token chose stays where it is. Distances are float32 and measured from the mean
centroid, so that a common offset of all tokens costs no precision.
"""

import numpy as np

MAX_QUERY_CENTROIDS = 256
MAX_KEY_CENTROIDS = 1000
"""Most clusters of queries and of keys. Keys get more: their clusters are what blocks pool over."""

TOKENS_PER_CENTROID = 64
"""Short sequences get fewer clusters: at least this many tokens per cluster on average."""

COLD_STEPS = 8
"""Lloyd steps from evenly spaced tokens."""

WARM_STEPS = 2
"""Lloyd steps from the centroids of an earlier call."""

CHUNK = 4096
"""Tokens whose distances are held at a time."""


def centroid_count(tokens: int, most: int) -> int:
    """Number of centroids for a number of tokens: at least 1, at most `most`."""
    return max(1, min(most, tokens // TOKENS_PER_CENTROID))


def evenly_spaced(tokens: int, count: int) -> np.ndarray:
    """int32 `[count]`: the tokens that cold centroids start on, `floor(i * tokens / count)`."""
    return (np.arange(count, dtype=np.int64) * tokens // count).astype(np.int32)


def assign(tokens: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Nearest centroid of each token, the lower one of equally near ones.

    Args:
        tokens: `[..., N, D]`.
        centroids: float32 `[..., C, D]`.

    Returns:
        int32 labels `[..., N]`.
    """
    centre = centroids.mean(axis=-2, keepdims=True, dtype=np.float32)
    shifted = centroids - centre
    # |x - c|^2 falls as x.c - |c|^2 / 2 rises; |x|^2 is the same for every centroid.
    half_norm = 0.5 * np.square(shifted).sum(axis=-1)[..., None, :]
    columns = np.swapaxes(shifted, -1, -2)
    labels = np.empty(tokens.shape[:-1], np.int32)
    for start in range(0, tokens.shape[-2], CHUNK):
        part = tokens[..., start : start + CHUNK, :].astype(np.float32) - centre
        labels[..., start : start + CHUNK] = np.argmax(part @ columns - half_norm, axis=-1)
    return labels


def update(tokens: np.ndarray, labels: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Mean of the tokens of each label; a centroid without tokens stays.

    Args:
        tokens: `[..., N, D]`.
        labels: int32 `[..., N]`.
        centroids: float32 `[..., C, D]`, used where a label has no token.

    Returns:
        float32 `[..., C, D]`.
    """
    moved = centroids.copy()
    for lead in np.ndindex(labels.shape[:-1]):
        order = np.argsort(labels[lead], kind="stable")
        used, first, count = np.unique(labels[lead][order], return_index=True, return_counts=True)
        sums = np.add.reduceat(tokens[lead][order].astype(np.float64), first, axis=0)
        moved[lead][used] = sums / count[:, None]
    return moved


def kmeans(
    tokens: np.ndarray,
    count: int,
    *,
    centroids: np.ndarray | None = None,
    order: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Labels and centroids after a fixed number of Lloyd steps.

    Args:
        tokens: `[..., N, D]`, N at least 1.
        count: number of centroids, 1..N.
        centroids: float32 `[..., count, D]` of an earlier call, for a warm start.
        order: int32 `[N]`, a permutation in which the tokens that a cold start takes are evenly
            spaced; None: as they come. Labels stay in the order of `tokens`.

    Returns:
        int32 labels `[..., N]` and the float32 centroids `[..., count, D]` they are nearest to.

    Raises:
        ValueError: count out of range, or warm centroids of another shape.
    """
    check_kmeans(tokens.shape, count, None if centroids is None else centroids.shape)
    steps = WARM_STEPS
    if centroids is None:
        steps = COLD_STEPS
        places = evenly_spaced(tokens.shape[-2], count)
        places = places if order is None else order[places]
        centroids = tokens[..., places, :].astype(np.float32)
    for _ in range(steps):
        centroids = update(tokens, assign(tokens, centroids), centroids)
    return assign(tokens, centroids), centroids


def check_kmeans(tokens: tuple[int, ...], count: int, centroids: tuple[int, ...] | None) -> None:
    """Refuse shapes that k-means cannot use; shapes only, so every framework can call it."""
    if not 1 <= count <= tokens[-2]:
        raise ValueError(f"count must be in 1..{tokens[-2]}, the number of tokens; got {count}")
    expected = (*tokens[:-2], count, tokens[-1])
    if centroids is not None and tuple(centroids) != expected:
        raise ValueError(
            f"centroids of an earlier call must have shape {expected}; got {tuple(centroids)}. "
            "Drop them when the video size, the batch or the number of heads changes"
        )
