"""What a token order is before it meets tokens: lengths, text place, fixed permutations."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import numpy as np

from shared_specs.order.checks import check_order_lengths
from shared_specs.order.gilbert import gilbert_order
from shared_specs.order.kmeans import MAX_KEY_CENTROIDS, MAX_QUERY_CENTROIDS, centroid_count
from shared_specs.order.sta import DEFAULT_TILE, sta_order


@dataclass(frozen=True)
class OrderPlan:
    """The part of a token order that depends on configuration and lengths alone.

    The `TokenOrder` of each framework is an `OrderPlan` that can also move tokens.

    Attributes:
        method: 'Gilbert', 'STA', 'SemanticAware', 'Hybrid', or None for the order as it comes.
        length: tokens of the sequence, video and text.
        grid: `(depth, height, width)` of the video tokens; None only with method None.
        tile: `(depth, height, width)` of an STA tile.
        text_length: text tokens, which keep their place and order.
        text_position: 'start' or 'end'.
    """

    method: str | None
    length: int
    grid: tuple[int, int, int] | None
    tile: tuple[int, int, int]
    text_length: int
    text_position: str

    @classmethod
    def from_config(cls, config, q_len: int, kv_len: int) -> Self:
        """The order that `config.rearrange_method` names, for a sequence of these lengths.

        With `rearrange_method=None` the result moves nothing, for any lengths.

        Raises:
            ValueError: causal attention; no grid; q_len != kv_len; length not grid + text.
        """
        if config.rearrange_method is not None:
            check_order_lengths(config, q_len, kv_len)
        return cls(
            method=config.rearrange_method,
            length=q_len,
            grid=config.grid,
            tile=DEFAULT_TILE if config.tile_size is None else config.tile_size,
            text_length=config.text_length,
            text_position=config.text_position,
        )

    @property
    def video(self) -> slice:
        """Where the video tokens are in the sequence."""
        start = self.text_length if self.text_position == "start" else 0
        return slice(start, start + self.length - self.text_length)

    @property
    def clusters_queries(self) -> bool:
        """Whether the order of queries comes from their values."""
        return self.method == "SemanticAware"

    @property
    def clusters_keys(self) -> bool:
        """Whether the order of keys and values comes from the keys' values."""
        return self.method in ("SemanticAware", "Hybrid")

    @property
    def query_centroids(self) -> int:
        """Number of centroids of the queries."""
        return centroid_count(self.length - self.text_length, MAX_QUERY_CENTROIDS)

    @property
    def key_centroids(self) -> int:
        """Number of centroids of the keys."""
        return centroid_count(self.length - self.text_length, MAX_KEY_CENTROIDS)

    def permutation(self) -> tuple[np.ndarray, np.ndarray]:
        """The fixed permutation of the whole sequence and its inverse, int32 `[length]`, read-only.

        It orders queries, keys and values of 'Gilbert' and 'STA', and queries of 'Hybrid'.
        """
        return _permutation(self)


@lru_cache(maxsize=64)
def _permutation(plan: OrderPlan) -> tuple[np.ndarray, np.ndarray]:
    if plan.method == "STA":
        video_order = sta_order(plan.grid, plan.tile)
    else:
        video_order = gilbert_order(plan.grid)
    order = np.arange(plan.length, dtype=np.int32)
    order[plan.video] = video_order + np.int32(plan.video.start)
    inverse = np.empty_like(order)
    inverse[order] = np.arange(plan.length, dtype=np.int32)
    for array in (order, inverse):
        array.setflags(write=False)
    return order, inverse
