"""Deterministic k-means in NumPy (specification, section 8)."""

import numpy as np
import pytest

from shared_specs import PSAConfig
from shared_specs.order import Centroids, TokenOrder, kmeans
from shared_specs.order.clustering import (
    COLD_STEPS,
    WARM_STEPS,
    assign,
    centroid_count,
    evenly_spaced,
    update,
)


def clusters(rng, *, count=5, each=40, dim=8, spread=0.05):
    """Tokens of well separated clusters, shuffled, and the cluster of each."""
    centres = rng.normal(size=(count, dim)) * 4
    truth = rng.permutation(np.repeat(np.arange(count), each))
    return (centres[truth] + spread * rng.normal(size=(count * each, dim))).astype(
        np.float32
    ), truth


def test_labels_are_the_nearest_centroids(rng):
    tokens = rng.normal(size=(2, 3, 500, 8)).astype(np.float32)
    centroids = rng.normal(size=(2, 3, 17, 8)).astype(np.float32)
    distances = np.square(tokens[..., :, None, :] - centroids[..., None, :, :]).sum(-1)
    labels = assign(tokens, centroids)
    assert labels.dtype == np.int32
    assert np.mean(labels == distances.argmin(-1)) > 0.999


def test_a_common_offset_changes_nothing(rng):
    # Exact in float32 only because distances are measured from the mean centroid.
    tokens = rng.integers(-8, 8, size=(1, 1, 400, 4)).astype(np.float32) / 8
    centroids = tokens[..., :16, :].copy()
    np.testing.assert_array_equal(
        assign(tokens, centroids), assign(tokens + np.float32(4096), centroids + np.float32(4096))
    )


def test_ties_go_to_the_lower_centroid():
    tokens = np.zeros((1, 1, 3, 2), np.float32)
    centroids = np.array([[[[2, 0], [0, 1], [0, -1], [1, 0]]]], np.float32)
    np.testing.assert_array_equal(assign(tokens, centroids), np.full((1, 1, 3), 1))


def test_empty_centroids_stay_and_others_move_to_the_mean(rng):
    tokens = rng.normal(size=(1, 2, 50, 4)).astype(np.float32)
    labels = rng.choice([0, 2, 5], size=(1, 2, 50)).astype(np.int32)
    centroids = rng.normal(size=(1, 2, 6, 4)).astype(np.float32)
    moved = update(tokens, labels, centroids)
    for head in range(2):
        for label in range(6):
            members = tokens[0, head][labels[0, head] == label]
            expected = members.mean(0) if len(members) else centroids[0, head, label]
            np.testing.assert_allclose(moved[0, head, label], expected, rtol=1e-5, atol=1e-6)


def test_cold_start_is_evenly_spaced_tokens(rng, monkeypatch):
    np.testing.assert_array_equal(evenly_spaced(10, 4), [0, 2, 5, 7])
    np.testing.assert_array_equal(evenly_spaced(7, 7), np.arange(7))
    tokens = rng.normal(size=(1, 1, 90, 4)).astype(np.float32)
    centroids = tokens[..., evenly_spaced(90, 6), :]
    for _ in range(COLD_STEPS):
        centroids = update(tokens, assign(tokens, centroids), centroids)
    labels, found = kmeans(tokens, 6)
    np.testing.assert_array_equal(found, centroids)
    np.testing.assert_array_equal(labels, assign(tokens, centroids))


def test_a_warm_start_takes_its_own_number_of_steps(rng):
    tokens = rng.normal(size=(1, 2, 90, 4)).astype(np.float32)
    start = rng.normal(size=(1, 2, 6, 4)).astype(np.float32)
    centroids = start
    for _ in range(WARM_STEPS):
        centroids = update(tokens, assign(tokens, centroids), centroids)
    labels, found = kmeans(tokens, 6, centroids=start)
    np.testing.assert_array_equal(found, centroids)
    np.testing.assert_array_equal(labels, assign(tokens, centroids))


def test_separate_clusters_are_found(rng):
    tokens, truth = clusters(rng)
    warm = np.stack([tokens[truth == label][0] for label in range(5)])[None, None]
    labels, _ = kmeans(tokens[None, None], 5, centroids=warm)
    np.testing.assert_array_equal(labels[0, 0], truth)


def test_tokens_of_a_cluster_become_neighbours(rng):
    tokens, truth = clusters(rng, count=4, each=256)
    config = PSAConfig(rearrange_method="SemanticAware", grid=(8, 8, 16))
    x = tokens[None, None]
    moved = TokenOrder.from_config(config, 1024, 1024).apply(x, x, x)[1]

    def changes(keys):
        return np.sum(np.linalg.norm(np.diff(keys[0, 0], axis=0), axis=-1) > 1)

    assert changes(moved) < 32 < 400 < changes(x)
    assert np.sum(np.diff(truth) != 0) > 400


def test_tokens_keep_their_order_inside_a_cluster(rng):
    x = rng.normal(size=(1, 1, 320, 4)).astype(np.float32)
    config = PSAConfig(rearrange_method="SemanticAware", grid=(5, 8, 8))
    _, _, _, state = TokenOrder.from_config(config, 320, 320).apply(x, x, x)
    labels = kmeans(x, centroid_count(320, 1000))[0][0, 0]
    order = state.queries.order[0, 0]
    pairs = list(zip(labels[order], order, strict=True))
    assert pairs == sorted(pairs)


def test_centroids_of_another_shape_are_refused(rng):
    tokens = rng.normal(size=(1, 2, 90, 4)).astype(np.float32)
    with pytest.raises(ValueError, match=r"shape \(1, 2, 6, 4\); got \(1, 2, 5, 4\)"):
        kmeans(tokens, 6, centroids=tokens[..., :5, :])
    for count in (0, 91):
        with pytest.raises(ValueError, match=rf"count must be in 1..90.* got {count}"):
            kmeans(tokens, count)


def test_centroids_pass_from_call_to_call(rng):
    config = PSAConfig(rearrange_method="SemanticAware", grid=(4, 10, 10))
    order = TokenOrder.from_config(config, 400, 400)
    q, k, v = rng.normal(size=(3, 1, 2, 400, 8)).astype(np.float32)
    *_, first = order.apply(q, k, v)
    assert first.centroids.keys.shape == (1, 2, order.key_centroids, 8)
    *_, second = order.apply(q, k, v, centroids=first.centroids)
    expected = kmeans(q, order.query_centroids, centroids=first.centroids.queries)[1]
    np.testing.assert_array_equal(second.centroids.queries, expected)
    with pytest.raises(ValueError, match="centroids of an earlier call"):
        order.apply(q, k, v, centroids=Centroids(first.centroids.queries[:, :1], None))


def test_the_number_of_centroids_fits_the_length():
    assert centroid_count(1, 1000) == 1
    assert centroid_count(75_600, 1000) == 1000
    assert centroid_count(75_600, 256) == 256
    assert 1 <= centroid_count(640, 1000) <= 640
