"""What a token order is in every framework: lengths, the place of text, who is moved how."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Self

import numpy as np

from shared_specs.config_types import CallConfig
from shared_specs.order.checks import check_order_lengths
from shared_specs.order.clustering import MAX_KEY_CENTROIDS, MAX_QUERY_CENTROIDS, centroid_count
from shared_specs.order.gilbert import gilbert_order
from shared_specs.order.sta import DEFAULT_TILE, sta_order

Array = Any
"""A NumPy array, torch tensor or jax array: each framework's `TokenOrder` uses its own."""


class Permutation(NamedTuple):
    """A permutation of the whole sequence, text included, and the one that undoes it.

    int32 `[L]`, the same for every head; `[B, H, L]`, one for each; or `[B, Hk, L]`, one for each
    group of query heads.
    """

    order: Array
    inverse: Array

    def reversed(self) -> Permutation:
        """The permutation that undoes this one."""
        return Permutation(self.inverse, self.order)


class Centroids(NamedTuple):
    """Cluster centres that a later call may start from; None where nothing was clustered."""

    queries: Array | None = None
    """float32 `[B, H, C, D]`."""
    keys: Array | None = None
    """float32 `[B, Hk, C, D]`."""


class OrderState(NamedTuple):
    """What one call of `apply` leaves behind: `undo` needs it, and `move` can use it again."""

    queries: Permutation | None = None
    """How the queries were moved; None when they were not."""
    keys: Permutation | None = None
    """How the keys and values were moved."""
    centroids: Centroids = Centroids()


@dataclass(frozen=True)
class TokenOrderBase(ABC):
    """A token order (specification, section 8), stateless.

    Attributes:
        method: 'Gilbert', 'STA', 'Clusters', 'SemanticAware', 'Hybrid', or None for the order as it
            comes.
        length: tokens of the sequence, video and text.
        grid: `(depth, height, width)` of the video tokens; None only with method None.
        tile: `(depth, height, width)` of an STA tile.
        text_length: text tokens, which keep their place and order.
        text_position: 'start' or 'end'.

    Examples:
        >>> order = TokenOrder.from_config(config, q_len, kv_len)
        >>> q, k, v, state = order.apply(q, k, v)
        >>> out = order.undo(attention(q, k, v), state)
    """

    method: str | None
    length: int
    grid: tuple[int, int, int] | None
    tile: tuple[int, int, int]
    text_length: int
    text_position: str

    @classmethod
    def from_config(cls, config: CallConfig, q_len: int, kv_len: int) -> Self:
        """The order that `config.rearrange_method` names, for a sequence of these lengths.

        With `rearrange_method=None` the result moves nothing, for any lengths.

        Raises:
            ValueError: no grid; q_len != kv_len; length not grid + text.
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
    def query_centroids(self) -> int | None:
        """Number of clusters of queries; None when queries are not clustered."""
        if self.method != "SemanticAware":
            return None
        return centroid_count(self.length - self.text_length, MAX_QUERY_CENTROIDS)

    @property
    def key_centroids(self) -> int | None:
        """Number of clusters of keys; None when keys are not clustered."""
        if self.method not in ("Clusters", "SemanticAware", "Hybrid"):
            return None
        return centroid_count(self.length - self.text_length, MAX_KEY_CENTROIDS)

    @property
    def curve(self) -> np.ndarray | None:
        """The order of the tokens inside a cluster, int32 `[video]`; None: as they come."""
        if self.method != "Clusters" or self.grid is None:
            return None
        return gilbert_order(self.grid)

    def apply(
        self, q: Array, k: Array, v: Array, *, centroids: Centroids | None = None
    ) -> tuple[Array, Array, Array, OrderState]:
        """Rearrange `q [B,H,L,D]` and `k, v [B,Hk,L,D]`; gradients flow through the moves only.

        Args:
            centroids: `state.centroids` of an earlier call, to start k-means from.

        Returns:
            q, k, v in the new order, and the state that `undo` needs.

        Raises:
            ValueError: centroids of another shape.
        """
        state = self.choose(q, k, centroids=centroids)
        return *self.move(q, k, v, state), state

    def choose(self, q: Array, k: Array, *, centroids: Centroids | None = None) -> OrderState:
        """The order for `q [B,H,L,D]` and `k [B,Hk,L,D]`; see `apply`."""
        if self.method is None:
            return OrderState()
        warm = Centroids() if centroids is None else centroids
        keys, k_centroids = self._permutation(k, self.key_centroids, warm.keys)
        if self.method in ("SemanticAware", "Hybrid"):
            queries, q_centroids = self._permutation(q, self.query_centroids, warm.queries)
        else:  # q moves as k does, in `Clusters` with the keys of its group
            queries, q_centroids = keys, None
        return OrderState(queries, keys, Centroids(q_centroids, k_centroids))

    def move(self, q: Array, k: Array, v: Array, state: OrderState) -> tuple[Array, Array, Array]:
        """q, k and v in an order that was chosen before, by `apply` or `choose` of other tokens."""
        if state.queries is None or state.keys is None:
            return q, k, v
        return self._take(q, state.queries), self._take(k, state.keys), self._take(v, state.keys)

    def undo(self, x: Array, state: OrderState) -> Array:
        """Put an output `[B,H,L,D]`, or its lse `[B,H,L]`, back as the queries came in."""
        return x if state.queries is None else self._take(x, state.queries.reversed())

    def fixed_permutation(self) -> Permutation:
        """The permutation that the grid alone decides, NumPy int32 `[length]`, read-only.

        'Gilbert' and 'STA' move everything by it, 'Hybrid' its queries.
        """
        return _fixed_permutation(self)

    def _permutation(
        self, tokens: Array, count: int | None, warm: Array | None
    ) -> tuple[Permutation, Array | None]:
        if count is None:
            return self._fixed(tokens), None
        return self._clustered(tokens, count, warm)

    @abstractmethod
    def _fixed(self, like: Array) -> Permutation:
        """`fixed_permutation` as arrays of this framework, where `like` lives."""

    @abstractmethod
    def _clustered(
        self, tokens: Array, count: int, warm: Array | None
    ) -> tuple[Permutation, Array]:
        """`by_cluster` of the labels of k-means, and the centroids used."""

    @abstractmethod
    def by_cluster(self, labels: Array) -> Permutation:
        """The order that sorts video tokens by their labels int32 `[B, H, video]`.

        Labels are those of this order's clusters, at least 0 and below their number. Tokens of a
        label follow each other along `curve`, or as they come where there is none.
        """

    @abstractmethod
    def _take(self, x: Array, permutation: Permutation) -> Array:
        """Tokens of `x [B,H,L]` or `[B,H,L,D]` in that order: one gather.

        An order of fewer heads than `x` has is that of groups of heads.
        """


@lru_cache(maxsize=64)
def _fixed_permutation(plan: TokenOrderBase) -> Permutation:
    assert plan.grid is not None  # else nothing moves
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
    return Permutation(order, inverse)
