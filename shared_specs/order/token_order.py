"""The token order on NumPy arrays: the rules of specification section 8 made runnable."""

import numpy as np

from shared_specs.order.base import Permutation, TokenOrderBase
from shared_specs.order.clustering import kmeans


class TokenOrder(TokenOrderBase):
    """Moves NumPy arrays q, k and v into an order, and the output back."""

    def _fixed(self, like: np.ndarray) -> Permutation:
        return self.fixed_permutation()

    def _clustered(
        self, tokens: np.ndarray, count: int, warm: np.ndarray | None
    ) -> tuple[Permutation, np.ndarray]:
        video = tokens[..., self.video, :]
        labels, centroids = kmeans(video, count, centroids=warm, order=self.curve)
        return self.by_cluster(labels), centroids

    def by_cluster(self, labels: np.ndarray) -> Permutation:
        """The order that sorts video tokens by their labels int32 `[B, H, video]`."""
        curve = np.arange(labels.shape[-1]) if self.curve is None else self.curve
        by_label = curve[np.argsort(labels[..., curve], axis=-1, kind="stable")]
        order = np.broadcast_to(np.arange(self.length), (*labels.shape[:-1], self.length))
        order = order.astype(np.int32)
        order[..., self.video] = by_label + self.video.start
        inverse = np.argsort(order, axis=-1, kind="stable").astype(np.int32)
        return Permutation(order, inverse)

    def _take(self, x: np.ndarray, permutation: Permutation) -> np.ndarray:
        order = permutation.order
        if order.ndim == 1:
            return np.take(x, order, axis=2)
        order = np.repeat(order, x.shape[1] // order.shape[1], axis=1)
        return np.take_along_axis(x, order if x.ndim == 3 else order[..., None], axis=2)
