"""The kernels of token orders: moves and sorts exactly, k-means up to what it says it rounds."""

import numpy as np
import pytest
import torch

from psa_torch import _dispatch
from psa_torch import order as rooms
from psa_torch.kernels import kmeans, label_sort, move
from psa_torch.order import TokenOrder
from shared_specs import PSAConfig
from shared_specs import order as spec
from shared_specs.order import clustering
from tests.torch.kernel_device import DEVICE, to_device, to_numpy

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def permutations(rng, *shape):
    order = rng.permuted(np.broadcast_to(np.arange(shape[-1]), shape), axis=-1)
    return order.astype(np.int32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("length", "head_dim"), [(300, 16), (77, 24), (5, 1100)])
@pytest.mark.parametrize("heads_of_orders", [(None, None), (4, 2), (2, 2), (None, 2)])
def test_moves_are_gathers(rng, heads_of_orders, length, head_dim, dtype):
    q, k, v = (
        to_device(rng.normal(size=(2, length, heads, head_dim)), dtype).transpose(1, 2)
        for heads in (4, 2, 2)
    )
    orders = [
        permutations(rng, length) if heads is None else permutations(rng, 2, heads, length)
        for heads in heads_of_orders
    ]
    q_order, kv_order = map(to_device, orders)
    moved = move.move(q, k, v, q_order, kv_order)
    for x, order, after in zip((q, k, v), (orders[0], orders[1], orders[1]), moved, strict=True):
        if order.ndim == 3:
            order = np.repeat(order, x.shape[1] // order.shape[1], axis=1)
        else:
            order = np.broadcast_to(order, x.shape[:3])
        expected = np.take_along_axis(to_numpy(x), order[..., None], axis=2)
        np.testing.assert_array_equal(to_numpy(after), expected)
        assert after.is_contiguous() and after.dtype == dtype
    assert torch.equal(move.move_one(q, q_order), moved[0])


@pytest.mark.parametrize("with_curve", [False, True])
@pytest.mark.parametrize(("n", "count"), [(1, 1), (700, 128), (1030, 300)])
def test_sorts_by_label_as_the_specification_does(rng, n, count, with_curve):
    labels = rng.integers(0, count, size=(2, 2, n)).astype(np.int32)
    curve = permutations(rng, n) if with_curve else None
    start, length = 5, n + 12
    found = label_sort.sort_by_label(
        to_device(labels), count, None if curve is None else to_device(curve),
        start=start, length=length,
    )  # fmt: skip
    along = np.arange(n) if curve is None else curve
    by_label = along[np.argsort(labels[..., along], axis=-1, kind="stable")]
    expected = np.broadcast_to(np.arange(length), (2, 2, length)).copy()
    expected[..., start : start + n] = by_label + start
    np.testing.assert_array_equal(to_numpy(found.order), expected)
    np.testing.assert_array_equal(to_numpy(found.inverse), np.argsort(expected, -1))
    totals = (labels[..., None] == np.arange(count)).sum(2)
    np.testing.assert_array_equal(to_numpy(found.totals)[..., :count], totals)
    np.testing.assert_array_equal(to_numpy(found.ends)[..., :count], totals.cumsum(-1))


def rounded(centroids, tokens):
    """Centroids as the kernel multiplies them: 11 digits of what they differ from a mean by."""
    places = clustering.evenly_spaced(tokens.shape[2], centroids.shape[2])
    centre = tokens[:, :, places].mean(2, keepdims=True)
    exponent = np.frexp(np.abs(tokens).max((2, 3), keepdims=True))[1]
    scale = np.ldexp(np.float32(1), kmeans.MAX_EXPONENT - exponent)
    return ((centroids - centre) * scale).astype(np.float16).astype(np.float32) / scale + centre


def distances(tokens, centroids):
    difference = tokens[..., :, None, :].astype(np.float64) - centroids[..., None, :, :]
    return np.square(difference).sum(-1)


@pytest.mark.parametrize(
    ("dtype", "size", "offset"),
    [
        (torch.bfloat16, 1.0, 0.0),
        (torch.bfloat16, 1e-6, 20.0),
        (torch.bfloat16, 1e30, 20.0),
        (torch.float16, 1.0, 20.0),
        (torch.float16, 1e4, 0.0),
    ],
)
def test_labels_are_those_of_the_nearest_centroid(rng, dtype, size, offset):
    tokens = to_device((rng.normal(size=(1, 1, 400, 32)) + offset) * size, dtype)
    wide = to_numpy(tokens)
    start = wide[:, :, clustering.evenly_spaced(400, 50)] * np.float32(1.01)
    labels, unmoved = kmeans.kmeans(tokens, to_device(start), 0)
    np.testing.assert_array_equal(to_numpy(unmoved), start)
    labels = to_numpy(labels)
    assert labels.dtype == np.int32
    for centroids, slack in ((rounded(start, wide), 3e-5), (start, 2e-3)):
        every = distances(wide / size, centroids / size)
        chosen = np.take_along_axis(every, labels[..., None], -1)[..., 0]
        spread = np.square((wide - start.mean(2, keepdims=True)) / size).sum(-1).max()
        assert np.all(chosen <= every.min(-1) + slack * spread)
    assert np.mean(labels == clustering.assign(wide / size, start / size)) > 0.98


def test_equal_distances_take_the_lower_centroid():
    tokens = torch.zeros(1, 1, 3, 16, device=DEVICE, dtype=torch.bfloat16)
    tokens[..., 0] = 1
    centroids = torch.zeros(1, 1, 130, 16, device=DEVICE)
    centroids[..., 1] = 3
    for equal in (129, 70, 65, 4):
        centroids[0, 0, equal] = 0
        centroids[0, 0, equal, 0] = 2
        labels, _ = kmeans.kmeans(tokens, centroids, 0)
        assert labels.tolist() == [[[equal] * 3]]


def test_means_are_those_of_the_tokens_and_empty_centroids_stay(rng):
    tokens = to_device(rng.normal(size=(2, 2, 700, 24)) + 3, torch.bfloat16)[:, :, 20:]
    labels = rng.choice([0, 3, 4, 29], size=(2, 2, 680)).astype(np.int32)
    start = rng.normal(size=(2, 2, 30, 24)).astype(np.float32)
    scale = kmeans.scales(tokens)
    by_label = label_sort.sort_by_label(to_device(labels), 30)
    centroids = to_device(start)
    moved, _ = kmeans.move_centroids(tokens, centroids, by_label, scale, centroids.mean(2))
    expected = clustering.update(to_numpy(tokens), labels, start)
    np.testing.assert_allclose(to_numpy(moved), expected, rtol=1e-5, atol=1e-6)


def test_the_last_assignment_is_to_the_centroids_that_are_returned(rng):
    tokens = to_device(rng.normal(size=(1, 1, 600, 16)), torch.bfloat16)
    start = tokens[:, :, :40].float()
    labels, centroids = kmeans.kmeans(tokens, start, 1)
    again, _ = kmeans.kmeans(tokens, centroids, 0)
    assert torch.equal(again, labels)
    first = clustering.assign(to_numpy(tokens), to_numpy(start))
    expected = clustering.update(to_numpy(tokens), first, to_numpy(start))
    assert np.mean(np.abs(to_numpy(centroids) - expected) < 1e-4) > 0.9
    repeated = kmeans.kmeans(tokens.clone(), start.clone(), 1)
    assert torch.equal(repeated[0], labels) and torch.equal(repeated[1], centroids)


def test_distances_of_zero_take_the_lower_centroid():
    tokens = torch.zeros(1, 1, 3, 16, device=DEVICE, dtype=torch.bfloat16)
    centroids = torch.ones(1, 1, 70, 16, device=DEVICE)
    centroids[:, :, [3, 40, 66]] = 0
    assert kmeans.kmeans(tokens, centroids, 0)[0].tolist() == [[[3] * 3]]


@pytest.mark.parametrize("far", [1e30, 3e38])
def test_far_centroids_and_far_tokens_give_labels_in_range(rng, far):
    tokens = to_device(rng.normal(size=(1, 1, 200, 16)), torch.bfloat16)
    start = tokens[:, :, :9].float()
    start[..., 4, :] = far
    labels, centroids = kmeans.kmeans(tokens, start, 0)
    near = [place for place in range(9) if place != 4]
    expected = distances(to_numpy(tokens), to_numpy(start)[:, :, near]).argmin(-1)
    assert np.mean(to_numpy(labels) == np.take(near, expected)) > 0.98
    labels, centroids = kmeans.kmeans(tokens, start, 1)
    assert not (labels == 4).any() and centroids.isfinite().all()


@pytest.mark.parametrize(
    ("method", "position"),
    [("Gilbert", "start"), ("Clusters", "start"), ("Clusters", "end"), ("SemanticAware", "end")],
)
def test_orders_of_kernels_agree_with_the_rule(rng, method, position, monkeypatch):
    monkeypatch.setattr(rooms, "COLD_STEPS", 1)
    monkeypatch.setattr(clustering, "COLD_STEPS", 1)
    config = PSAConfig(
        rearrange_method=method, grid=(4, 8, 9), text_length=7, text_position=position
    )
    length = 4 * 8 * 9 + 7
    order = TokenOrder.from_config(config, length, length)
    q, k, v = (
        to_device(rng.normal(size=(1, heads, length, 16)), torch.bfloat16) for heads in (2, 1, 1)
    )
    with _dispatch.forced_kernels():
        *moved, state = order.apply(q, k, v)
        back = order.undo(moved[0], state)
        lse = order.undo(moved[0][..., 0], state)
    assert torch.equal(back, q) and torch.equal(lse, q[..., 0])
    reference = spec.TokenOrder.from_config(config, length, length)
    if state.centroids.keys is not None:
        video = to_numpy(k)[:, :, order.video]
        with _dispatch.forced_kernels():
            labels, _ = rooms.kmeans(
                k[:, :, order.video], order.key_centroids, order=order._curve(k)
            )
        expected = reference.by_cluster(to_numpy(labels))
        np.testing.assert_array_equal(to_numpy(state.keys.order), expected.order)
        np.testing.assert_array_equal(to_numpy(state.keys.inverse), expected.inverse)
        wanted, _ = clustering.kmeans(video, order.key_centroids, order=reference.curve)
        assert np.mean(to_numpy(labels) == wanted) > 0.95
    else:
        for x, y in zip(reference.apply(*map(to_numpy, (q, k, v))), moved, strict=False):
            np.testing.assert_array_equal(x, to_numpy(y))


@pytest.mark.parametrize("method", ["Gilbert", "Clusters"])
def test_gradients_pass_through_the_moves(rng, method, monkeypatch):
    monkeypatch.setattr(rooms, "COLD_STEPS", 1)
    config = PSAConfig(rearrange_method=method, grid=(4, 8, 8))
    qkv = [
        to_device(rng.normal(size=(1, heads, 256, 16)), torch.bfloat16).requires_grad_()
        for heads in (2, 1, 1)
    ]
    order = TokenOrder.from_config(config, 256, 256)
    with _dispatch.forced_kernels():
        *moved, _ = order.apply(*qkv)
        weights = [torch.randn_like(x) for x in moved]
        ours = torch.autograd.grad(moved, qkv, weights)

    def pairs(x, y):
        return sorted(zip(x.flatten().tolist(), y.flatten().tolist(), strict=True))

    for x, grad, after, weight in zip(qkv, ours, moved, weights, strict=True):
        assert pairs(x, grad) == pairs(after, weight)
