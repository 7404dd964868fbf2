"""Token orders and k-means are the same in PyTorch and JAX."""

import numpy as np
import pytest
import torch

from psa_jax import order as jax_order
from psa_torch import order as torch_order
from shared_specs import PSAConfig
from shared_specs import order as spec
from shared_specs.order import clustering


@pytest.mark.parametrize("position", ["start", "end"])
@pytest.mark.parametrize("method", ["Gilbert", "STA", "Clusters", "SemanticAware", "Hybrid"])
def test_the_same_tokens_move_to_the_same_places(rng, method, position):
    config = PSAConfig(
        rearrange_method=method, grid=(5, 8, 9), text_length=11, text_position=position
    )
    length = 5 * 8 * 9 + 11
    q, k, v = rng.normal(size=(3, 1, 4, length, 16)).astype(np.float32)
    k, v = k[:, ::2], v[:, ::2]
    *ours, state = torch_order.TokenOrder.from_config(config, length, length).apply(
        *map(torch.from_numpy, (q, k, v))
    )
    *theirs, other = jax_order.TokenOrder.from_config(config, length, length).apply(q, k, v)
    for x, y in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(x.numpy(), y)
    for x, y in zip(state.queries, other.queries, strict=True):
        np.testing.assert_array_equal(x.numpy(), y)
    for x, y in zip(state.centroids, other.centroids, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            np.testing.assert_allclose(x.numpy(), y, atol=1e-5)


@pytest.mark.parametrize("position", ["start", "end"])
@pytest.mark.parametrize("method", ["Clusters", "SemanticAware"])
def test_equal_labels_give_equal_orders(rng, method, position):
    config = PSAConfig(
        rearrange_method=method, grid=(5, 8, 9), text_length=11, text_position=position
    )
    orders = [
        module.TokenOrder.from_config(config, 371, 371) for module in (spec, torch_order, jax_order)
    ]
    labels = rng.integers(0, orders[0].key_centroids, size=(2, 3, 360)).astype(np.int32)
    wanted, ours, theirs = (
        order.by_cluster(x)
        for order, x in zip(orders, (labels, torch.from_numpy(labels), labels), strict=True)
    )
    for x, y, z in zip(wanted, ours, theirs, strict=True):
        assert y.dtype == torch.int32 and x.dtype == z.dtype == np.int32
        np.testing.assert_array_equal(x, y.numpy())
        np.testing.assert_array_equal(x, z)
    there_and_back = np.take_along_axis(*wanted, -1)
    np.testing.assert_array_equal(there_and_back, np.broadcast_to(np.arange(371), (2, 3, 371)))


@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_labels_agree_from_equal_centroids(rng, offset):
    # Channels of different size and a common offset, as keys of a video model have them.
    tokens = rng.normal(size=(1, 2, 6000, 64)) * np.geomspace(0.1, 10, 64) + offset
    tokens = tokens.astype(np.float32)
    start = tokens[:, :, clustering.evenly_spaced(6000, 187)]
    expected = clustering.assign(tokens, start)
    ours, _ = torch_order._lloyd_step(torch.from_numpy(tokens), torch.from_numpy(start), move=False)
    theirs, _ = jax_order.lloyd(tokens, start, 0)
    assert np.mean(ours.numpy() == expected) >= 0.999
    assert np.mean(np.asarray(theirs) == expected) >= 0.999
    assert np.mean(np.asarray(theirs) == ours.numpy()) >= 0.999
