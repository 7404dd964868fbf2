"""The token order on NumPy arrays: the rules of specification section 8 made runnable."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from shared_specs.order.kmeans import kmeans
from shared_specs.order.plan import OrderPlan


class Centroids(NamedTuple):
    """Warm start of the next call: float32 `[B, H, C, D]` and `[B, Hk, C, D]`, or None."""

    queries: np.ndarray | None = None
    keys: np.ndarray | None = None


class OrderState(NamedTuple):
    """What one call leaves behind.

    Attributes:
        inverse: int32 `[L]` or `[B, H, L]`, the permutation that undoes the queries' order; None
            when nothing was moved.
        centroids: what a later call may start from.
    """

    inverse: np.ndarray | None = None
    centroids: Centroids = Centroids()


class TokenOrder(OrderPlan):
    """Moves q, k and v into an order, and the output back.

    >>> order = TokenOrder.from_config(config, q_len, kv_len)
    >>> q, k, v, state = order.apply(q, k, v)
    >>> out = order.undo(attention(q, k, v), state)
    """

    def apply(
        self, q: np.ndarray, k: np.ndarray, v: np.ndarray, *, centroids: Centroids | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, OrderState]:
        """Rearrange `q [B,H,L,D]` and `k, v [B,Hk,L,D]`.

        Args:
            centroids: `state.centroids` of an earlier call, to start k-means from.

        Raises:
            ValueError: centroids of another shape.
        """
        if self.method is None:
            return q, k, v, OrderState()
        warm = Centroids() if centroids is None else centroids
        q_order, k_order = None, None
        q_centroids, k_centroids = None, None
        if self.clusters_queries:
            q_order, q_centroids = self._semantic(q, self.query_centroids, warm.queries)
        if self.clusters_keys:
            k_order, k_centroids = self._semantic(k, self.key_centroids, warm.keys)
        if q_order is None:
            q_order = self.permutation()[0]
        if k_order is None:
            k_order = self.permutation()[0]
        state = OrderState(invert(q_order), Centroids(q_centroids, k_centroids))
        return take(q, q_order), take(k, k_order), take(v, k_order), state

    def undo(self, x: np.ndarray, state: OrderState) -> np.ndarray:
        """Put an output `[B,H,L,D]` or `[B,H,L]` (lse) back into the order the tokens came in."""
        return x if state.inverse is None else take(x, state.inverse)

    def _semantic(
        self, tokens: np.ndarray, count: int, warm: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Full-sequence order `[B, H, L]` that sorts video tokens by cluster, and the centroids."""
        labels, centroids = kmeans(tokens[..., self.video, :], count, centroids=warm)
        order = np.broadcast_to(np.arange(self.length), tokens.shape[:-1]).astype(np.int32)
        order[..., self.video] = np.argsort(labels, axis=-1, kind="stable") + self.video.start
        return order, centroids


def invert(order: np.ndarray) -> np.ndarray:
    """The permutation along the last axis that undoes `order`."""
    return np.argsort(order, axis=-1, kind="stable").astype(np.int32)


def take(x: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Tokens of `x [B,H,L]` or `[B,H,L,D]` in the order `[L]` or `[B,H,L]`."""
    if order.ndim == 1:
        return np.take(x, order, axis=2)
    return np.take_along_axis(x, order if x.ndim == 3 else order[..., None], axis=2)
