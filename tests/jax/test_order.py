"""psa_jax.order against the NumPy specification; gradients, jit, vmap, determinism, memory."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax import order as order_module
from psa_jax.order import Centroids, TokenOrder, kmeans, lloyd, permute
from shared_specs import PSAConfig
from shared_specs import order as spec
from shared_specs.order import clustering

METHODS = ("Gilbert", "STA", "Clusters", "SemanticAware", "Hybrid")
GRID, TEXT = (4, 8, 9), 7
LENGTH = 4 * 8 * 9 + TEXT


def config_of(method, **fields):
    return PSAConfig(
        rearrange_method=method, grid=GRID, tile_size=(2, 2, 4), text_length=TEXT, **fields
    )


def make_qkv(rng, length=LENGTH, heads=4, kv_heads=2, dim=16):
    return tuple(
        rng.normal(size=(2, count, length, dim)).astype(np.float32)
        for count in (heads, kv_heads, kv_heads)
    )


def round_trip(order, q, k, v):
    *moved, state = order.apply(q, k, v)
    return *moved, order.undo(moved[0], state)


@pytest.mark.parametrize("position", ["start", "end"])
@pytest.mark.parametrize("method", [None, *METHODS])
def test_moves_equal_the_specification(rng, method, position):
    config = config_of(method, text_position=position)
    qkv = make_qkv(rng)
    order = TokenOrder.from_config(config, LENGTH, LENGTH)
    *moved, state = jax.jit(order.apply)(*qkv)
    reference = spec.TokenOrder.from_config(config, LENGTH, LENGTH)
    *expected, _ = reference.apply(*qkv)
    chex.assert_trees_all_equal(moved, expected)
    np.testing.assert_array_equal(order.undo(moved[0], state), qkv[0])
    np.testing.assert_array_equal(order.undo(moved[0][..., 0], state), qkv[0][..., 0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_round_trip_is_exact_in_every_dtype(rng, method, dtype):
    qkv = [jnp.asarray(x, dtype) for x in make_qkv(rng)]
    order = TokenOrder.from_config(config_of(method), LENGTH, LENGTH)
    moved, *_, back = round_trip(order, *qkv)
    assert moved.dtype == dtype
    np.testing.assert_array_equal(back, qkv[0])


@pytest.mark.parametrize("method", METHODS)
def test_gradients_flow_through_the_moves_only(rng, method):
    qkv = make_qkv(rng)
    order = TokenOrder.from_config(config_of(method), LENGTH, LENGTH)
    outputs, pull_back = jax.vjp(lambda *x: round_trip(order, *x), *qkv)
    weights = [rng.normal(size=x.shape).astype(np.float32) for x in outputs]
    nothing = np.zeros_like(weights[3])

    def values_with(x, y):
        return set(zip(np.ravel(x).tolist(), np.ravel(y).tolist(), strict=True))

    grads = jax.jit(pull_back)((*map(jnp.asarray, weights[:3]), nothing))
    for x, grad, after, weight in zip(qkv, grads, outputs, weights, strict=False):
        assert values_with(x, grad) == values_with(after, weight)
    there_and_back = pull_back((nothing, *map(np.zeros_like, weights[1:3]), weights[3]))[0]
    np.testing.assert_array_equal(there_and_back, weights[3])


@pytest.mark.parametrize("method", METHODS)
def test_runs_under_vmap(rng, method):
    order = TokenOrder.from_config(config_of(method), LENGTH, LENGTH)
    qkv = make_qkv(rng)
    mapped = jax.vmap(lambda *x: round_trip(order, *x))(
        *(np.stack([x, x[:, :, ::-1]]) for x in qkv)
    )
    for place, arrays in enumerate((qkv, [x[:, :, ::-1] for x in qkv])):
        for ours, theirs in zip(mapped, round_trip(order, *arrays), strict=True):
            np.testing.assert_array_equal(ours[place], theirs)


def test_permute_is_one_gather(rng):
    x = rng.normal(size=(1, 2, 30, 4)).astype(np.float32)
    order = rng.permutation(30).astype(np.int32)
    text = str(jax.make_jaxpr(permute)(x, order))
    assert text.count(" gather[") == 1 and "indices_are_sorted=False" in text
    np.testing.assert_array_equal(permute(x, order), x[:, :, order])


def test_labels_equal_the_specification_from_equal_centroids(rng):
    tokens = rng.normal(size=(1, 2, 3000, 32)).astype(np.float32) + 20
    centroids = tokens[:, :, clustering.evenly_spaced(3000, 100)]
    found, unmoved = lloyd(tokens, centroids, 0)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(unmoved, centroids)
    expected = clustering.assign(tokens, centroids)
    assert np.mean(found == expected) >= 0.999
    _, moved = lloyd(tokens, centroids, 1)
    wanted = clustering.update(tokens, expected, centroids)
    assert np.mean(np.abs(moved - wanted) < 1e-4) >= (1 if np.all(found == expected) else 0.99)


@pytest.mark.parametrize("warm", [False, True])
def test_kmeans_follows_the_specification(rng, warm):
    tokens = rng.normal(size=(2, 2, 700, 16)).astype(np.float32)
    start = rng.normal(size=(2, 2, 20, 16)).astype(np.float32) if warm else None
    labels, centroids = kmeans(tokens, 20, centroids=start)
    wanted_labels, wanted = clustering.kmeans(tokens, 20, centroids=start)
    assert np.mean(labels == wanted_labels) >= 0.999
    np.testing.assert_allclose(centroids, wanted, atol=2e-3)


def test_ties_and_empty_centroids():
    tokens = jnp.zeros((1, 1, 3, 2))
    centroids = jnp.array([[[[2.0, 0], [0, 1], [0, -1], [1, 0]]]])
    np.testing.assert_array_equal(lloyd(tokens, centroids, 0)[0], [[[1, 1, 1]]])
    np.testing.assert_allclose(
        lloyd(tokens, centroids, 1)[1], centroids.at[0, 0, 1].set(0), atol=1e-6
    )


def test_kmeans_repeats_itself_bit_for_bit(rng):
    tokens = rng.normal(size=(1, 2, 900, 16)).astype(np.float32)
    for ours, again in zip(kmeans(tokens, 25), kmeans(tokens.copy(), 25), strict=True):
        np.testing.assert_array_equal(ours, again)


def test_distances_are_bounded_whatever_the_length(rng, monkeypatch):
    tokens = rng.normal(size=(1, 3, 500, 8)).astype(np.float32)
    whole, _ = kmeans(tokens, 10)
    monkeypatch.setattr(order_module, "DISTANCE_ELEMENTS", 3 * 10 * 64)
    chunked, _ = kmeans(tokens, 10)
    assert np.mean(chunked == whole) >= 0.999


def test_memory_at_full_size_is_bounded():
    tokens = jax.ShapeDtypeStruct((1, 24, 75_600, 128), jnp.float32)
    centroids = jax.ShapeDtypeStruct((1, 24, 1000, 128), jnp.float32)
    compiled = jax.jit(lambda *x: lloyd(*x, 8)).lower(tokens, centroids).compile()
    # All distances at once would be 7 GB, and with D between tokens and centroids 900 GB.
    assert compiled.memory_analysis().temp_size_in_bytes < 5e8


def test_a_warm_start_is_used_and_checked(rng):
    q, k, v = make_qkv(rng)
    order = TokenOrder.from_config(config_of("SemanticAware"), LENGTH, LENGTH)
    *_, first = order.apply(q, k, v)
    *_, second = order.apply(q, k, v, centroids=first.centroids)
    video_k = k[:, :, : LENGTH - TEXT]
    expected = kmeans(video_k, order.key_centroids, centroids=first.centroids.keys)[1]
    np.testing.assert_array_equal(second.centroids.keys, expected)
    assert not np.array_equal(second.centroids.keys, first.centroids.keys)
    with pytest.raises(ValueError, match="centroids of an earlier call must have shape"):
        order.apply(q, k, v, centroids=Centroids(None, first.centroids.keys[:, :1]))
