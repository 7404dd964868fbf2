"""Token orders and the video module on a CUDA device: agreement, repeatability, no host waits."""

import numpy as np
import pytest
import torch

from psa_torch import PSAVideoAttention, VideoState
from psa_torch.kernels import kmeans as kernels
from psa_torch.order import TokenOrder, _lloyd_step, kmeans
from shared_specs import PSAConfig
from shared_specs import order as spec
from shared_specs.order import clustering

pytestmark = pytest.mark.gpu

METHODS = ("Gilbert", "STA", "Clusters", "SemanticAware", "Hybrid")
GRID, TEXT = (6, 16, 20), 77
LENGTH = 6 * 16 * 20 + TEXT


def draw(dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)

    def tensor(heads):
        return torch.randn(1, heads, LENGTH, 64, device="cuda", dtype=dtype, generator=generator)

    return tensor(4), tensor(2), tensor(2)


def config_of(method):
    return PSAConfig(rearrange_method=method, grid=GRID, text_length=TEXT)


@pytest.mark.parametrize("method", METHODS)
def test_round_trip_is_exact(method):
    qkv = draw()
    order = TokenOrder.from_config(config_of(method), LENGTH, LENGTH)
    *moved, state = order.apply(*qkv)
    assert torch.equal(order.undo(moved[0], state), qkv[0])
    assert not torch.equal(moved[0], qkv[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_labels_agree_with_the_specification_from_equal_centroids(dtype):
    tokens = torch.randn(1, 2, 6000, 128, device="cuda") + 20
    tokens = tokens.to(dtype)
    start = tokens[:, :, clustering.evenly_spaced(6000, 187)].float()
    labels, _ = _lloyd_step(tokens, start, move=False)
    expected = clustering.assign(tokens.float().cpu().numpy(), start.cpu().numpy())
    assert np.mean(labels.cpu().numpy() == expected) >= 0.999


def test_labels_of_the_kernel_are_those_of_the_nearest_centroid():
    tokens = (torch.randn(1, 2, 6000, 128, device="cuda") + 3).bfloat16()
    start = tokens[:, :, clustering.evenly_spaced(6000, 187)].float()
    labels, _ = kernels.kmeans(tokens, start, 0)
    wide = tokens.double()
    every = torch.cdist(wide, start.double()).square()
    chosen = every.gather(-1, labels.long()[..., None])[..., 0]
    assert (chosen <= every.amin(-1) * 1.002).all()
    assert (labels == every.argmin(-1)).float().mean() >= 0.99


@pytest.mark.parametrize("method", ["Clusters", "SemanticAware"])
def test_the_order_sorts_by_the_labels(method):
    _, k, v = draw()
    order = TokenOrder.from_config(config_of(method), LENGTH, LENGTH)
    state = order.choose(draw()[0], k)
    labels, _ = kmeans(k[:, :, order.video], order.key_centroids, order=order._curve(k))
    expected = spec.TokenOrder.from_config(config_of(method), LENGTH, LENGTH)
    expected = expected.by_cluster(labels.cpu().numpy())
    np.testing.assert_array_equal(state.keys.order.cpu().numpy(), expected.order)
    np.testing.assert_array_equal(state.keys.inverse.cpu().numpy(), expected.inverse)


def test_kmeans_repeats_itself_bit_for_bit_in_bounded_memory():
    tokens = torch.randn(1, 24, 75_600, 128, device="cuda", dtype=torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    first = kmeans(tokens, 1000)
    # All distances at once would be 7 GB.
    assert torch.cuda.max_memory_allocated() - before < 1.5e9
    assert all(torch.equal(a, b) for a, b in zip(first, kmeans(tokens, 1000), strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_no_host_waits_until_records_are_read(method):
    state = VideoState()
    module = PSAVideoAttention(config_of(method), warmup_steps=1, layer="a", state=state)
    qkv = draw()
    for state.step in range(3):  # compiles, and puts the fixed order on the device
        module(*qkv)
    state.records.clear()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for state.step in range(3):
            module(*qkv)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    densities = {record.density for record in state.records.read()}
    assert len(state.records) == 3 and all(0 < value <= 1 for value in densities)
