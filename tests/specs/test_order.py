"""Token orders in NumPy (specification, section 8)."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_specs import PSAConfig
from shared_specs.attention import sparse_attention
from shared_specs.order import TokenOrder, gilbert_order, kmeans, sta_order
from shared_specs.order import gilbert as gilbert_module
from shared_specs.order.clustering import MAX_KEY_CENTROIDS, centroid_count

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
METHODS = ("Gilbert", "STA", "Clusters", "SemanticAware", "Hybrid")

grids = st.tuples(*[st.integers(1, 12)] * 3)


def coordinates(order, grid):
    return np.stack(np.unravel_index(order, grid), -1)


def make_qkv(rng, length, heads=4, kv_heads=2, dim=16):
    def tensor(count):
        return rng.normal(size=(2, count, length, dim)).astype(np.float32)

    return tensor(heads), tensor(kv_heads), tensor(kv_heads)


def test_gilbert_equals_the_recorded_orders():
    index = json.loads((GOLDEN / "index.json").read_text())
    (case,) = [case for case in index["cases"] if case["kind"] == "gilbert"]
    data = np.load(GOLDEN / case["file"])
    for width, height, depth in case["config"]["grids"]:
        order = gilbert_order((depth, height, width))
        name = f"{width}x{height}x{depth}"
        np.testing.assert_array_equal(order, data[f"order_{name}"])
        np.testing.assert_array_equal(np.argsort(order), data[f"inverse_{name}"])


@settings(max_examples=200, deadline=None)
@given(grids)
def test_gilbert_visits_every_token_once(grid):
    order = gilbert_order(grid)
    assert order.dtype == np.int32 and not order.flags.writeable
    np.testing.assert_array_equal(np.sort(order), np.arange(np.prod(grid)))


@pytest.mark.parametrize("grid", [(4, 6, 8), (16, 16, 16), (18, 48, 80), (1, 6, 10), (2, 2, 30)])
def test_gilbert_steps_to_a_neighbour_where_the_sides_are_even(grid):
    steps = np.abs(np.diff(coordinates(gilbert_order(grid), grid), axis=0)).sum(1)
    assert steps.max() == 1


@pytest.mark.parametrize("grid", [(5, 5, 5), (21, 45, 81), (7, 1, 9), (3, 30, 11)])
def test_gilbert_stays_local_where_sides_are_odd(grid):
    # An odd side costs a longer step now and then; raster order steps a whole row back each row.
    steps = np.abs(np.diff(coordinates(gilbert_order(grid), grid), axis=0)).sum(1)
    assert steps.mean() < 1.1 and steps.max() <= 5


def test_gilbert_is_fast_and_cached():
    grid = (21, 48, 80)
    gilbert_module._gilbert_order.cache_clear()
    start = time.perf_counter()
    first = gilbert_order(grid)
    assert time.perf_counter() - start < 0.5
    assert gilbert_order(list(grid)) is first


@settings(max_examples=100, deadline=None)
@given(grids, st.tuples(*[st.integers(1, 5)] * 3))
def test_sta_lists_whole_tiles_in_raster_order(grid, tile):
    order = sta_order(grid, tile)
    assert order.dtype == np.int32 and not order.flags.writeable
    np.testing.assert_array_equal(np.sort(order), np.arange(np.prod(grid)))
    expected = [
        x + grid[2] * (y + grid[1] * z)
        for z0 in range(0, grid[0], tile[0])
        for y0 in range(0, grid[1], tile[1])
        for x0 in range(0, grid[2], tile[2])
        for z in range(z0, min(z0 + tile[0], grid[0]))
        for y in range(y0, min(y0 + tile[1], grid[1]))
        for x in range(x0, min(x0 + tile[2], grid[2]))
    ]
    np.testing.assert_array_equal(order, expected)


@pytest.mark.parametrize("grid", [(0, 4, 4), (4, 4), (4, 4, 2.5), "444", (True, 4, 4), 64])
def test_bad_grids_and_tiles_are_refused(grid):
    with pytest.raises(ValueError, match="grid must be .* got "):
        gilbert_order(grid)
    with pytest.raises(ValueError, match="grid must be .* got "):
        sta_order(grid, (2, 2, 2))
    with pytest.raises(ValueError, match="tile must be .* got "):
        sta_order((4, 4, 4), grid)


@pytest.mark.parametrize("position", ["start", "end"])
@pytest.mark.parametrize("method", [None, *METHODS])
def test_round_trip_is_exact_and_text_stays(rng, method, position):
    grid, text = (5, 7, 9), 9
    config = PSAConfig(
        rearrange_method=method,
        grid=grid,
        tile_size=(2, 2, 3),
        text_length=text,
        text_position=position,
    )
    length = 5 * 7 * 9 + text
    q, k, v = make_qkv(rng, length)
    order = TokenOrder.from_config(config, length, length)
    moved_q, moved_k, moved_v, state = order.apply(q, k, v)
    np.testing.assert_array_equal(order.undo(moved_q, state), q)
    np.testing.assert_array_equal(order.undo(moved_q[..., 0], state), q[..., 0])
    place = slice(0, text) if position == "start" else slice(length - text, length)
    for before, after in zip((q, k, v), (moved_q, moved_k, moved_v), strict=True):
        np.testing.assert_array_equal(after[:, :, place], before[:, :, place])
        assert (method is None) == np.array_equal(after, before)
        np.testing.assert_array_equal(np.sort(after, axis=2), np.sort(before, axis=2))


@pytest.mark.parametrize("method", METHODS)
def test_dense_attention_is_unchanged(rng, method):
    config = PSAConfig(rearrange_method=method, grid=(4, 6, 7), text_length=5)
    length = 4 * 6 * 7 + 5
    q, k, v = make_qkv(rng, length)
    levels = np.ones((2, 4, -(-length // 128), -(-length // 64)), np.int32)
    blocks = {"block_m": 128, "block_n": 64}
    expected, expected_lse = sparse_attention(q, k, v, levels, **blocks, return_lse=True)
    order = TokenOrder.from_config(config, length, length)
    *moved, state = order.apply(q, k, v)
    out, lse = sparse_attention(*moved, levels, **blocks, return_lse=True)
    np.testing.assert_allclose(order.undo(out, state), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(order.undo(lse, state), expected_lse, rtol=0, atol=1e-12)


def test_each_method_moves_what_it_says(rng):
    grid = (4, 8, 8)
    q, k, v = make_qkv(rng, 256)
    moved = {}
    for method in METHODS:
        config = PSAConfig(rearrange_method=method, grid=grid, tile_size=(2, 2, 2))
        moved[method] = TokenOrder.from_config(config, 256, 256).apply(q, k, v)[:3]
    for x, after in zip((q, k, v), moved["Gilbert"], strict=True):
        np.testing.assert_array_equal(after, x[:, :, gilbert_order(grid)])
    for x, after in zip((q, k, v), moved["STA"], strict=True):
        np.testing.assert_array_equal(after, x[:, :, sta_order(grid, (2, 2, 2))])
    np.testing.assert_array_equal(moved["Hybrid"][0], moved["Gilbert"][0])
    np.testing.assert_array_equal(moved["Hybrid"][1], moved["SemanticAware"][1])
    np.testing.assert_array_equal(moved["Hybrid"][2], moved["SemanticAware"][2])


def test_values_follow_their_keys(rng):
    q, k, _ = make_qkv(rng, 5 * 6 * 7)
    config = PSAConfig(rearrange_method="SemanticAware", grid=(5, 6, 7))
    _, moved_k, moved_v, _ = TokenOrder.from_config(config, 210, 210).apply(q, k, k.copy())
    np.testing.assert_array_equal(moved_k, moved_v)


@pytest.mark.parametrize("method", METHODS)
def test_what_an_order_cannot_do_is_refused(method):
    config = PSAConfig(rearrange_method=method, grid=(2, 3, 4), text_length=6)
    assert TokenOrder.from_config(config, 30, 30).length == 30
    with pytest.raises(ValueError, match="length 31 is not grid .* together 30"):
        TokenOrder.from_config(config, 31, 31)
    with pytest.raises(ValueError, match="q_len=30, kv_len=12"):
        TokenOrder.from_config(config, 30, 12)
    with pytest.raises(ValueError, match="needs grid=.* got grid=None"):
        TokenOrder.from_config(PSAConfig(rearrange_method=method), 30, 30)
    with pytest.raises(ValueError, match="causal=True"):
        PSAConfig(rearrange_method=method, grid=(2, 3, 4), causal=True)


def test_no_order_takes_any_lengths(rng):
    order = TokenOrder.from_config(PSAConfig(text_length=40), 30, 12)
    q, k, v = rng.normal(size=(3, 1, 1, 12, 8))
    moved = order.apply(q, k, v)
    assert moved[0] is q and moved[1] is k and moved[2] is v
    assert order.undo(q, moved[3]) is q


def clusters_by_hand(q, k, v, config):
    """What `Clusters` makes of q, k, v, token by token: keys on the curve, then by label."""
    video = TokenOrder.from_config(config, q.shape[2], q.shape[2]).video
    curve = gilbert_order(config.grid)
    count = centroid_count(len(curve), MAX_KEY_CENTROIDS)
    labels, centroids = kmeans(k[:, :, video][:, :, curve], count)
    group = q.shape[1] // k.shape[1]
    moved = [x.copy() for x in (q, k, v)]
    for batch, head in np.ndindex(k.shape[:2]):
        places = [
            video.start + curve[place]
            for label in range(count)
            for place in np.flatnonzero(labels[batch, head] == label)
        ]
        heads = (slice(head * group, (head + 1) * group), slice(head, head + 1))
        for x, after, head_slice in zip((q, k, v), moved, (*heads, heads[1]), strict=True):
            after[batch][head_slice, video] = x[batch][head_slice, places]
    return *moved, centroids


def assert_clusters(order, config, q, k, v):
    *moved, state = order.apply(q, k, v)
    *expected, centroids = clusters_by_hand(q, k, v, config)
    for ours, theirs in zip(moved, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_allclose(state.centroids.keys, centroids, atol=1e-5)
    assert state.centroids.queries is None


class QueriesLead(TokenOrder):
    def apply(self, q, k, v, **options):
        group = q.shape[1] // k.shape[1]
        _, moved_q, _, state = super().apply(q, q[:, ::group], v, **options)
        return (*(self._take(x, state.queries) for x in (q, k, v)), state)


class QueriesStayOnTheCurve(TokenOrder):
    def apply(self, q, k, v, **options):
        _, k, v, state = super().apply(q, k, v, **options)
        return self._take(q, self.fixed_permutation()), k, v, state


class RasterInside(TokenOrder):
    curve = None


class NoClusters(TokenOrder):
    def by_cluster(self, labels):
        return self.fixed_permutation()


@pytest.mark.parametrize("position", ["start", "end"])
@pytest.mark.parametrize("mutant", [QueriesLead, QueriesStayOnTheCurve, RasterInside, NoClusters])
def test_clusters_move_a_group_by_the_clusters_of_its_keys(rng, mutant, position):
    config = PSAConfig(
        rearrange_method="Clusters", grid=(5, 8, 9), text_length=7, text_position=position
    )
    qkv = make_qkv(rng, 5 * 8 * 9 + 7)
    assert_clusters(TokenOrder.from_config(config, 367, 367), config, *qkv)
    with pytest.raises(AssertionError):
        assert_clusters(mutant.from_config(config, 367, 367), config, *qkv)


def test_clusters_start_from_the_centroids_of_an_earlier_call(rng):
    config = PSAConfig(rearrange_method="Clusters", grid=(5, 8, 9))
    order = TokenOrder.from_config(config, 360, 360)
    q, k, v = make_qkv(rng, 360)
    *_, first = order.apply(q, k, v)
    *_, second = order.apply(q, k, v, centroids=first.centroids)
    expected = kmeans(k, order.key_centroids, centroids=first.centroids.keys)[1]
    np.testing.assert_array_equal(second.centroids.keys, expected)
