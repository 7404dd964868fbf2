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
        labels, centroids = kmeans(tokens[..., self.video, :], count, centroids=warm)
        order = np.broadcast_to(np.arange(self.length), tokens.shape[:-1]).astype(np.int32)
        order[..., self.video] = np.argsort(labels, axis=-1, kind="stable") + self.video.start
        inverse = np.argsort(order, axis=-1, kind="stable").astype(np.int32)
        return Permutation(order, inverse), centroids

    def _take(self, x: np.ndarray, permutation: Permutation) -> np.ndarray:
        order = permutation.order
        if order.ndim == 1:
            return np.take(x, order, axis=2)
        return np.take_along_axis(x, order if x.ndim == 3 else order[..., None], axis=2)
