"""PSAVideoAttention that keeps its order and levels for some steps."""

import dataclasses

import pytest
import torch

from psa_torch import PSAVideoAttention, VideoState, psa_attention, sparse_attention
from psa_torch.choice import choose_levels
from psa_torch.order import TokenOrder
from shared_specs import PSAConfig

GRID, LENGTH = (4, 8, 9), 4 * 8 * 9 + 12
METHODS = [None, "Gilbert", "Clusters", "SemanticAware", "Hybrid"]


BLOCKS = {"block_m": 64, "block_n": 32}
RATIOS = {1: (0.0, 0.3), 4: (0.3, 0.6)}


def config_of(method):
    return PSAConfig(
        rearrange_method=method, grid=GRID, text_length=12, mask_ratios=RATIOS, **BLOCKS
    )


def make_qkv(rng, length=LENGTH, heads=4, kv_heads=2):
    return [
        torch.from_numpy(rng.normal(size=(1, count, length, 16)))
        for count in (heads, kv_heads, kv_heads)
    ]


def by_hand(config, chosen_by, qkv, centroids=None):
    """Attention of `qkv` with the order and levels of `chosen_by`; the centroids it left."""
    order = TokenOrder.from_config(config, LENGTH, LENGTH)
    moved_q, moved_k, places, state = order.apply(
        *chosen_by[:2],
        torch.arange(LENGTH, dtype=torch.float64)[:, None].expand(1, 2, LENGTH, 16).contiguous(),
        centroids=centroids,
    )
    levels = choose_levels(moved_q, moved_k, config).levels
    where = places.long()  # which token stands at each place, per key/value head
    q, k, v = qkv
    q = q if state.queries is None else order._take(q, state.queries)
    out = sparse_attention(q, k.gather(2, where), v.gather(2, where), levels, **BLOCKS)
    return order.undo(out, state), state.centroids


@pytest.mark.parametrize("method", METHODS)
def test_kept_steps_use_the_order_and_levels_of_the_step_that_chose(rng, method):
    config = config_of(method)
    layer = PSAVideoAttention(config, warmup_steps=1, refresh_every=3)
    steps = [make_qkv(rng) for _ in range(8)]
    outputs = [layer(*qkv, step=step) for step, qkv in enumerate(steps)]
    centroids = None
    for first in (1, 4, 7):
        for step in range(first, min(first + 3, 8)):
            expected, left = by_hand(config, steps[first], steps[step], centroids)
            torch.testing.assert_close(outputs[step], expected)
            if step > first:  # choosing anew would have been something else
                anew, _ = by_hand(config, steps[step], steps[step], centroids)
                assert not torch.allclose(outputs[step], anew, atol=1e-3)
        centroids = left
    if layer.centroids is not None:
        torch.testing.assert_close(layer.centroids.keys, centroids.keys)
        assert layer.centroids_step == 7


@pytest.mark.parametrize("method", ["Gilbert", "Clusters", "Hybrid"])
def test_orders_and_levels_are_handed_on_without_the_module(rng, method):
    config = config_of(method)
    layer = PSAVideoAttention(config, refresh_every=2)
    first, second = make_qkv(rng), make_qkv(rng)
    order = TokenOrder.from_config(config, LENGTH, LENGTH)
    plain = dataclasses.replace(config, rearrange_method=None)
    state = order.choose(*first[:2])
    out, levels = psa_attention(*order.move(*first, state), config=plain, return_levels=True)
    assert torch.equal(order.undo(out, state), layer(*first, step=0))
    out = psa_attention(*order.move(*second, state), config=plain, levels=levels)
    torch.testing.assert_close(order.undo(out, state), layer(*second, step=1))


@pytest.mark.parametrize("method", ["Gilbert", "Clusters"])
def test_steps_that_are_skipped_count(rng, method):
    config = config_of(method)
    layer = PSAVideoAttention(config, refresh_every=3)
    steps = [make_qkv(rng) for _ in range(3)]
    layer(*steps[0], step=0)
    expected, centroids = by_hand(config, steps[0], steps[1])
    torch.testing.assert_close(layer(*steps[1], step=2), expected)
    expected, _ = by_hand(config, steps[2], steps[2], centroids)
    torch.testing.assert_close(layer(*steps[2], step=5), expected)


@pytest.mark.parametrize("method", ["Gilbert", "Hybrid"])
def test_an_earlier_step_a_warm_up_step_and_reset_choose_anew(rng, method):
    config = config_of(method)
    layer = PSAVideoAttention(config, warmup_steps=1, refresh_every=4)
    first, second = make_qkv(rng), make_qkv(rng)
    expected, _ = by_hand(config, second, second)
    for leave in (lambda: None, lambda: layer(*first, step=0), layer.reset):
        layer(*first, step=2)
        leave()
        torch.testing.assert_close(layer(*second, step=1), expected)
        layer.reset()


@pytest.mark.parametrize("method", [None, "Clusters"])
def test_another_shape_is_refused_until_reset(rng, method):
    config = config_of(method)
    layer = PSAVideoAttention(config, refresh_every=4)
    layer(*make_qkv(rng), step=0)
    other = make_qkv(rng, heads=2, kv_heads=1)
    with pytest.raises(ValueError, match="kept since step 0 must have shape .* reset"):
        layer(*other, step=1)
    layer(*other, step=1, branch="other")
    layer.reset()
    layer(*other, step=1)


def test_a_missing_step_and_a_bad_period_are_refused(rng):
    with pytest.raises(ValueError, match="step must be given with refresh_every=2; got None"):
        PSAVideoAttention(config_of(None), refresh_every=2)(*make_qkv(rng))
    with pytest.raises(ValueError, match="refresh_every must be at least 1, got 0"):
        PSAVideoAttention(refresh_every=0)
    for bad in (True, 2.0, None):
        with pytest.raises(TypeError, match="refresh_every must be an integer"):
            PSAVideoAttention(refresh_every=bad)


@pytest.mark.parametrize("method", ["Gilbert", "Clusters"])
def test_records_are_of_every_step(rng, method):
    state = VideoState()
    layer = PSAVideoAttention(config_of(method), refresh_every=2, state=state)
    for state.step in range(3):
        layer(*make_qkv(rng))
    records = state.records.read()
    assert [record.step for record in records] == [0] * 4 + [1] * 4 + [2] * 4


def test_under_vmap(rng):
    layer = PSAVideoAttention(config_of("Clusters"), refresh_every=2)
    steps = [[torch.stack([x, x.flip(2)]) for x in make_qkv(rng)] for _ in range(2)]
    found = [
        torch.vmap(lambda *x, step=step: layer(*x, step=step))(*qkv)
        for step, qkv in enumerate(steps)
    ]
    layer.reset()
    for step, qkv in enumerate(steps):
        expected = layer(*(x.flatten(0, 1) for x in qkv), step=step)
        torch.testing.assert_close(found[step].flatten(0, 1), expected)
