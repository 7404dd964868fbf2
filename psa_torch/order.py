"""Token orders on tensors (specification, section 8): fixed permutations and k-means on device.

The rules, names and checks are `shared_specs.order`'s; this module only moves and clusters tensors.
Nothing here waits for the device, and every custom op below is opaque to `torch.compile`.
"""

import functools

import torch
from torch import Tensor

from psa_torch._dispatch import announce, use_kernels
from psa_torch._transforms import is_transformed
from psa_torch._vmap import fold
from shared_specs.order import (
    Centroids,
    OrderState,
    Permutation,
    TokenOrderBase,
    gilbert_order,
    sta_order,
)
from shared_specs.order.clustering import (
    COLD_STEPS,
    WARM_STEPS,
    check_kmeans,
)

__all__ = [
    "Centroids",
    "OrderState",
    "Permutation",
    "TokenOrder",
    "gilbert_order",
    "kmeans",
    "permute",
    "sta_order",
]

DISTANCE_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 25}
"""Most token-to-centroid distances held at a time, whatever the length: what fits the cache of a
CPU; 128 MB of float32 on a GPU, where each chunk costs some kernel launches."""


KERNEL_DTYPES = (torch.float16, torch.bfloat16)
"""Dtypes that the kernels of k-means take."""


class TokenOrder(TokenOrderBase):
    """Moves tensors q, k and v into an order, and the output back."""

    def _fixed(self, like: Tensor) -> Permutation:
        assert self.method is not None and self.grid is not None  # else nothing moves
        method, grid, tile = self.method, list(self.grid), list(self.tile)
        return Permutation(
            *_fixed_order(
                like.detach(), method, self.length, grid, tile, self.text_length, self.text_position
            )
        )

    def _clustered(
        self, tokens: Tensor, count: int, warm: Tensor | None
    ) -> tuple[Permutation, Tensor | None]:
        curve = self._curve(tokens)
        labels, centroids = self._labels(tokens[..., self.video, :], count, warm, curve)
        return self.by_cluster(labels), centroids

    def _curve(self, like: Tensor) -> Tensor | None:
        """`curve` where `like` lives."""
        if self.method != "Clusters":
            return None
        return self._fixed(like).order[self.video] - self.video.start

    def _labels(
        self, tokens: Tensor, count: int, warm: Tensor | None, curve: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        return kmeans(tokens, count, centroids=warm, order=curve)

    def by_cluster(self, labels: Tensor) -> Permutation:
        """The order that sorts video tokens by their labels int32 `[B, H, video]`."""
        count = max(self.query_centroids or 0, self.key_centroids)
        return Permutation(
            *_cluster_order(labels, self._curve(labels), count, self.video.start, self.length)
        )

    def move(
        self, q: Tensor, k: Tensor, v: Tensor, state: OrderState
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v in an order that was chosen before, by `apply` or `choose` of other tokens."""
        if state.queries is None or state.keys is None or is_transformed():
            return super().move(q, k, v, state)
        return _move(q, k, v, *state.queries, *state.keys)

    def _take(self, x: Tensor, permutation: Permutation) -> Tensor:
        return permute(x, permutation.order, permutation.inverse)


def permute(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Tokens of `x [B,H,L]` or `[B,H,L,D]` in an order: one gather.

    `order` is int32 `[L]`, `[B,H,L]`, or `[B,Hk,L]` for groups of heads; `inverse` undoes it, and
    the gradient is one gather by it.
    """
    # PyTorch's own gather has every derivative, but adds up gradients that meet nowhere.
    return _gather(x, order) if is_transformed() else _permute(x, order, inverse)


@torch.library.custom_op("psa::permute", mutates_args=())
def _permute(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    return _gather(x, order)


def _gather(x: Tensor, order: Tensor) -> Tensor:
    if x.ndim == 4 and use_kernels(x) and not is_transformed():
        from psa_torch.kernels import move

        return move.move_one(x, order)
    if order.ndim == 1:
        return x.index_select(2, order)
    index = order.long().repeat_interleave(x.shape[1] // order.shape[1], 1)
    return x.gather(2, index if x.ndim == 3 else index[..., None].expand(x.shape))


@_permute.register_fake
def _(x, order, inverse):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save_permutation(ctx, inputs, output):
    _, order, inverse = inputs
    ctx.save_for_backward(order, inverse)


def _permute_backward(ctx, grad):
    order, inverse = ctx.saved_tensors
    return permute(grad, inverse, order), None, None


_permute.register_autograd(_permute_backward, setup_context=_save_permutation)


@_permute.register_vmap
def _(info, in_dims, x, order, inverse):
    size = info.batch_size
    x = fold(x, in_dims[0], size)
    if order.ndim > 1:  # an order per head; one for all heads is never mapped
        order, inverse = fold(order, in_dims[1], size), fold(inverse, in_dims[2], size)
    return _permute(x, order, inverse).unflatten(0, (size, -1)), 0


@torch.library.custom_op("psa::move", mutates_args=())
def _move(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_order: Tensor,
    q_inverse: Tensor,
    kv_order: Tensor,
    kv_inverse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`permute` of q by one order, and of k and v by another: one launch on a GPU."""
    if use_kernels(q):
        from psa_torch.kernels import move

        q, k, v = move.move(q, k, v, q_order, kv_order)
        return q, k, v
    return _gather(q, q_order), _gather(k, kv_order), _gather(v, kv_order)


@_move.register_fake
def _(q, k, v, *orders):
    contiguous = torch.contiguous_format
    return tuple(torch.empty_like(x, memory_format=contiguous) for x in (q, k, v))


def _save_orders(ctx, inputs, output):
    ctx.save_for_backward(*inputs[3:])


def _move_backward(ctx, *grads):
    q_order, q_inverse, kv_order, kv_inverse = ctx.saved_tensors
    moved = _move(*grads, q_inverse, q_order, kv_inverse, kv_order)
    return *moved, None, None, None, None


_move.register_autograd(_move_backward, setup_context=_save_orders)


@_move.register_vmap
def _(info, in_dims, *arguments):
    size = info.batch_size
    folded = [
        x if x.ndim == 1 else fold(x, dim, size)  # an order of all heads is never mapped
        for x, dim in zip(arguments, in_dims, strict=True)
    ]
    return tuple(x.unflatten(0, (size, -1)) for x in _move(*folded)), (0, 0, 0)


@torch.library.custom_op("psa::cluster_order", mutates_args=())
def _cluster_order(
    labels: Tensor, curve: Tensor | None, count: int, start: int, length: int
) -> tuple[Tensor, Tensor]:
    """Order and inverse int32 `[B, H, length]` that sort `start … start + N - 1` by label, of which
    there are `count`."""
    n = labels.shape[-1]
    if use_kernels(labels) and labels.numel():
        from psa_torch.kernels import label_sort

        labels = labels.contiguous()
        found = label_sort.sort_by_label(labels, count, curve, start=start, length=length)
        return found.order, found.inverse
    along = labels if curve is None else labels.index_select(-1, curve)
    by_label = torch.argsort(along, dim=-1, stable=True)
    if curve is not None:
        by_label = curve[by_label]
    place = torch.arange(length, device=labels.device).expand(*labels.shape[:-1], length)
    order = torch.cat([place[..., :start], by_label + start, place[..., start + n :]], -1)
    return order.int(), order.argsort(-1).int()


@_cluster_order.register_fake
def _(labels, curve, count, start, length):
    return tuple(labels.new_empty(*labels.shape[:2], length) for _ in range(2))


@_cluster_order.register_vmap
def _(info, in_dims, labels, curve, *arguments):
    size = info.batch_size
    found = _cluster_order(fold(labels, in_dims[0], size), curve, *arguments)
    return tuple(x.unflatten(0, (size, -1)) for x in found), (0, 0)


@functools.lru_cache(maxsize=64)
def _fixed_on(order: TokenOrder, device: torch.device) -> tuple[Tensor, Tensor]:
    order, inverse = order.fixed_permutation()
    # A copy: the NumPy arrays are read-only, which a tensor cannot say.
    return torch.tensor(order, device=device), torch.tensor(inverse, device=device)


@torch.library.custom_op("psa::fixed_order", mutates_args=())
def _fixed_order(
    like: Tensor,
    method: str,
    length: int,
    grid: list[int],
    tile: list[int],
    text_length: int,
    text_position: str,
) -> tuple[Tensor, Tensor]:
    """The permutation of a grid and its inverse, int32 `[length]`, on the device of `like`.

    An op of its own so that a compiled graph neither traces the NumPy code nor holds the arrays.
    """
    (depth, height, width), (t, h, w) = grid, tile
    plan = TokenOrder(method, length, (depth, height, width), (t, h, w), text_length, text_position)
    order, inverse = _fixed_on(plan, like.device)
    return order.clone(), inverse.clone()  # an op's outputs are its caller's to overwrite


@_fixed_order.register_fake
def _(like, method, length, grid, tile, text_length, text_position):
    return tuple(like.new_empty(length, dtype=torch.int32) for _ in range(2))


@_fixed_order.register_vmap
def _(info, in_dims, like, *arguments):
    return _fixed_order(like, *arguments), (None, None)


def kmeans(
    tokens: Tensor,
    count: int,
    *,
    centroids: Tensor | None = None,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Labels and centroids after a fixed number of Lloyd steps (specification, section 8).

    No gradient flows through either. Sums run in a fixed order, so that equal inputs give equal
    results; memory is bounded by `DISTANCE_ELEMENTS` whatever the number of tokens.

    Args:
        tokens: `[B, H, N, D]`.
        count: number of centroids, 1..N.
        centroids: float32 `[B, H, count, D]` of an earlier call, for a warm start.
        order: int32 `[N]`, a permutation in which the tokens that a cold start takes are evenly
            spaced; None: as they come. Labels stay in the order of `tokens`.

    Returns:
        int32 labels `[B, H, N]` and the float32 centroids `[B, H, count, D]` they are nearest to.

    Raises:
        ValueError: count out of range, or warm centroids of another shape.
    """
    check_kmeans(tuple(tokens.shape), count, None if centroids is None else tuple(centroids.shape))
    return _kmeans(tokens.detach(), count, None if centroids is None else centroids.detach(), order)


@torch.library.custom_op("psa::kmeans", mutates_args=())
def _kmeans(
    tokens: Tensor, count: int, centroids: Tensor | None, order: Tensor | None
) -> tuple[Tensor, Tensor]:
    steps = WARM_STEPS
    if centroids is None:
        steps = COLD_STEPS
        places = torch.arange(count, device=tokens.device) * tokens.shape[2] // count
        places = places if order is None else order.index_select(0, places)
        centroids = tokens.index_select(2, places)
    centroids = centroids.float()
    if use_kernels(tokens) and tokens.numel():
        if tokens.dtype in KERNEL_DTYPES:
            from psa_torch.kernels import kmeans as kernels

            return kernels.kmeans(tokens, centroids, steps)
        announce("%s run as plain torch: %s", "k-means", "its kernels take 16-bit floats")
    with torch.autocast(tokens.device.type, enabled=False):
        for _ in range(steps):
            _, centroids = _lloyd_step(tokens, centroids, move=True)
        labels, _ = _lloyd_step(tokens, centroids, move=False)
    return labels, centroids.clone()


@_kmeans.register_fake
def _(tokens, count, centroids, order):
    b, h, n, d = tokens.shape
    labels = tokens.new_empty(b, h, n, dtype=torch.int32)
    return labels, tokens.new_empty(b, h, count, d, dtype=torch.float32)


@_kmeans.register_vmap
def _(info, in_dims, tokens, count, centroids, order):
    size = info.batch_size
    tokens, centroids = fold(tokens, in_dims[0], size), fold(centroids, in_dims[2], size)
    found = _kmeans(tokens, count, centroids, order)  # one order for all: it is never mapped
    return tuple(x.unflatten(0, (size, -1)) for x in found), (0, 0)


def _lloyd_step(tokens: Tensor, centroids: Tensor, *, move: bool) -> tuple[Tensor, Tensor]:
    """Labels of the tokens, and the centroids moved to the mean of their tokens if asked to."""
    b, h, n, _ = tokens.shape
    count = centroids.shape[2]
    # Distances are measured from the mean centroid: a common offset then costs no precision.
    centre = centroids.mean(2, keepdim=True)
    shifted = (centroids - centre).flatten(0, 1)
    half_norm = shifted.square().sum(-1)[:, None] / 2
    columns = shifted.mT
    most = DISTANCE_ELEMENTS.get(tokens.device.type, DISTANCE_ELEMENTS["cuda"])
    chunk = max(1, most // max(1, b * h * count))
    ids = torch.arange(count, device=tokens.device)
    labels = []
    sums, sizes = torch.zeros_like(shifted), torch.zeros_like(shifted[..., :1])
    for part in tokens.split(chunk, 2):
        part = (part.float() - centre).flatten(0, 1)
        label = torch.baddbmm(half_norm, part, columns, beta=-1).argmax(-1)
        labels.append(label.int())
        if move:
            # A product with the one-hot labels adds in a fixed order; scattered adds would not.
            chosen = (label[..., None] == ids).float()
            sums.baddbmm_(chosen.mT, part)
            sizes += chosen.sum(1)[..., None]
    if move:
        means = (sums / sizes.clamp(min=1)).unflatten(0, (b, h)) + centre
        centroids = torch.where(sizes.unflatten(0, (b, h)) > 0, means, centroids)
    return torch.cat(labels, 1).unflatten(0, (b, h)), centroids
