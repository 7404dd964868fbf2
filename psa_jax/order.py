"""Token orders on jax arrays (specification, section 8): fixed permutations and k-means on device.

The rules, names and checks are `shared_specs.order`'s; this module only moves and clusters arrays.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from psa_jax._sharding import vary_alike
from psa_jax._switches import numpy_rules
from shared_specs.order import (
    Centroids,
    OrderState,
    Permutation,
    TokenOrderBase,
    gilbert_order,
    sta_order,
)
from shared_specs.order.clustering import COLD_STEPS, WARM_STEPS, check_kmeans, evenly_spaced

__all__ = [
    "Centroids",
    "OrderState",
    "Permutation",
    "Resumed",
    "TokenOrder",
    "gilbert_order",
    "kmeans",
    "permute",
    "sta_order",
]

DISTANCE_ELEMENTS = 1 << 25
"""Most token-to-centroid distances held at a time: 128 MB in float32, whatever the length."""


class Resumed(NamedTuple):
    """Centroids that may stand in `Centroids` where only a traced value tells if they count.

    Attributes:
        centroids: float32 `[B, H, C, D]`, of any value if `warm` is False.
        warm: boolean scalar; False starts from evenly spaced tokens.
    """

    centroids: Array
    warm: Array


class TokenOrder(TokenOrderBase):
    """Moves jax arrays q, k and v into an order, and the output back; usable under `jit`."""

    def _fixed(self, like: Array) -> Permutation:
        return Permutation(*map(jnp.asarray, self.fixed_permutation()))

    def _clustered(
        self, tokens: Array, count: int, warm: Array | None
    ) -> tuple[Permutation, Array]:
        video = tokens[..., self.video, :]
        labels, centroids = kmeans(video, count, centroids=warm, order=self.curve)
        return self.by_cluster(labels), centroids

    @numpy_rules
    def by_cluster(self, labels: Array) -> Permutation:
        """The order that sorts video tokens by their labels int32 `[B, H, video]`."""
        along = labels if self.curve is None else labels[..., self.curve]
        by_label = jnp.argsort(along, axis=-1, stable=True)
        if self.curve is not None:
            by_label = jnp.asarray(self.curve)[by_label]
        by_cluster = by_label + self.video.start
        place = jnp.broadcast_to(
            jnp.arange(self.length, dtype=jnp.int32), (*labels.shape[:-1], self.length)
        )
        order = place.at[..., self.video].set(by_cluster.astype(jnp.int32))
        inverse = jnp.argsort(order, axis=-1, stable=False)
        return Permutation(order, inverse.astype(jnp.int32))

    def _take(self, x: Array, permutation: Permutation) -> Array:
        return permute(x, permutation.order)


@numpy_rules
def permute(x: Array, order: Array) -> Array:
    """Tokens of `x [B,H,L]` or `[B,H,L,D]` in an order: one gather.

    `order` is int32 `[L]`, `[B,H,L]`, or `[B,Hk,L]` for groups of heads.
    """
    if order.ndim == 3 and order.shape[1] != x.shape[1]:
        order = jnp.repeat(order, x.shape[1] // order.shape[1], axis=1)

    def take(tokens, index):
        # Unique and in bounds: no clamping, and the gradient is a plain scatter without atomics.
        return tokens.at[index].get(unique_indices=True, mode="promise_in_bounds")

    shared = None if order.ndim == 1 else 0
    return jax.vmap(jax.vmap(take, (0, shared)), (0, shared))(x, order)


@numpy_rules
def kmeans(
    tokens: Array,
    count: int,
    *,
    centroids: Array | Resumed | None = None,
    order: Array | np.ndarray | None = None,
) -> tuple[Array, Array]:
    """Labels and centroids after a fixed number of Lloyd steps (specification, section 8).

    No gradient flows through either. Sums run in a fixed order, so that equal inputs give equal
    results; memory is bounded by `DISTANCE_ELEMENTS` whatever the number of tokens.

    Args:
        tokens: `[B, H, N, D]`.
        count: number of centroids, 1..N.
        centroids: float32 `[B, H, count, D]` of an earlier call, for a warm start; `Resumed` where
            a traced value decides whether there is one.
        order: int32 `[N]`, a permutation in which the tokens that a cold start takes are evenly
            spaced; None: as they come. Labels stay in the order of `tokens`.

    Returns:
        int32 labels `[B, H, N]` and the float32 centroids `[B, H, count, D]` they are nearest to.

    Raises:
        ValueError: count out of range, or warm centroids of another shape.
    """
    start, warm = (
        centroids if isinstance(centroids, Resumed) else (centroids, centroids is not None)
    )
    check_kmeans(tokens.shape, count, None if start is None else start.shape)
    tokens = lax.stop_gradient(tokens)
    cold = evenly_spaced_tokens(tokens, count, order)
    if start is None:
        return lloyd(tokens, cold, COLD_STEPS)
    start = jnp.where(warm, lax.stop_gradient(start), cold)
    return lloyd(tokens, start, jnp.where(warm, WARM_STEPS, COLD_STEPS))


def evenly_spaced_tokens(
    tokens: Array, count: int, order: Array | np.ndarray | None = None
) -> Array:
    """The cold centroids: float32 `[B, H, count, D]`."""
    places = evenly_spaced(tokens.shape[2], count)
    return tokens[:, :, places if order is None else order[places]].astype(jnp.float32)


def lloyd(tokens: Array, centroids: Array, steps: int | Array) -> tuple[Array, Array]:
    """Labels and centroids after `steps` Lloyd steps; `steps` may be a traced scalar."""
    b, h, n, _ = tokens.shape
    count = centroids.shape[2]
    chunk = min(n, max(1, DISTANCE_ELEMENTS // max(1, b * h * count)))
    return _lloyd(tokens, centroids, steps, chunk=chunk)


# Compiled once per shape, also for callers outside `jit`.
@functools.partial(jax.jit, static_argnames="chunk")
def _lloyd(
    tokens: Array, centroids: Array, steps: int | Array, *, chunk: int
) -> tuple[Array, Array]:
    n, count = tokens.shape[2], centroids.shape[2]
    starts = jnp.arange(0, n, chunk)
    exact = lax.Precision.HIGHEST  # float32 products: the default of a GPU is tf32

    def origin(centroids):
        # Distances are measured from the mean centroid: a common offset then costs no precision.
        centre = centroids.mean(2, keepdims=True)
        shifted = centroids - centre
        return centre, shifted, jnp.square(shifted).sum(-1)[:, :, None] / 2

    def nearest(start, centre, shifted, half_norm):
        # A slice that would pass the end is moved back: the last chunk overlaps the one before.
        part = lax.dynamic_slice_in_dim(tokens, start, chunk, 2).astype(jnp.float32) - centre
        distances = jnp.einsum("bhnd,bhcd->bhnc", part, shifted, precision=exact) - half_norm
        return part, jnp.argmax(distances, -1).astype(jnp.int32)

    def step(_, centroids):
        centre, *columns = origin(centroids)

        def add(carry, start):
            sums, sizes = carry
            part, label = nearest(start, centre, *columns)
            is_new = jnp.arange(chunk) + jnp.minimum(start, n - chunk) >= start
            # A product with the one-hot labels adds in a fixed order; scattered adds would not.
            chosen = (label[..., None] == jnp.arange(count)) & is_new[:, None]
            chosen = chosen.astype(jnp.float32)
            sums += jnp.einsum("bhnc,bhnd->bhcd", chosen, part, precision=exact)
            return (sums, sizes + chosen.sum(2)[..., None]), None

        zero = vary_alike(
            (jnp.zeros_like(centroids), jnp.zeros_like(centroids[..., :1])), tokens, centroids
        )
        (sums, sizes), _ = lax.scan(add, zero, starts)
        return jnp.where(sizes > 0, sums / jnp.maximum(sizes, 1) + centre, centroids)

    def label(labels, start):
        part_labels = nearest(start, *origin(centroids))[1]
        return lax.dynamic_update_slice_in_dim(labels, part_labels, start, 2), None

    centroids = lax.fori_loop(0, steps, step, centroids)
    (unlabelled,) = vary_alike((jnp.zeros(tokens.shape[:3], jnp.int32),), tokens, centroids)
    labels, _ = lax.scan(label, unlabelled, starts)
    return labels, centroids
