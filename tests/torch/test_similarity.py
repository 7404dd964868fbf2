"""psa_torch.similarity against the NumPy specification."""

import numpy as np
import pytest
import torch

from psa_torch.similarity import block_similarity, similarity_cap
from shared_specs import PSAConfig
from shared_specs.similarity import block_similarity as spec_similarity
from shared_specs.similarity import similarity_cap as spec_cap

OLD = {"attn_impl": "old_mask_type", "block_n": 128, "use_sim_mask": True}


def smooth_keys(rng, length, d=16):
    """Keys that drift, so that cosines spread over the whole range of thresholds."""
    steps = rng.standard_normal((2, 3, length, d)) * rng.choice([0.05, 0.3, 2.0], (2, 3, length, 1))
    return np.cumsum(steps, 2).astype(np.float32)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 128, 300, 513])
@pytest.mark.parametrize("level", [2, 4, 8])
def test_similarity_equals_the_specification(length, level, rng):
    k = smooth_keys(rng, length)
    got = block_similarity(torch.from_numpy(k), 128, level).numpy()
    np.testing.assert_allclose(got, spec_similarity(k, 128)[level], atol=2e-6)


@pytest.mark.parametrize("thresholds", [(0.0, 0.0, -1.0), (0.9, 0.8, 0.7), (0.7, 0.65, 0.6)])
def test_cap_equals_the_specification(thresholds, rng):
    k = smooth_keys(rng, 1500)
    names = ("sim_2x_threshold", "sim_4x_threshold", "sim_8x_threshold")
    config = PSAConfig(**OLD, **dict(zip(names, thresholds, strict=True)))
    got, want = similarity_cap(torch.from_numpy(k), config), spec_cap(k, config)
    assert got.dtype == torch.int32
    np.testing.assert_array_equal(got.numpy(), want)


def test_the_largest_level_that_passes_wins(rng):
    """Level 8 alone passes: the cap is 8 even where levels 2 and 4 do not."""
    k = smooth_keys(rng, 256)
    config = PSAConfig(**OLD, sim_2x_threshold=2.0, sim_4x_threshold=2.0, sim_8x_threshold=-2.0)
    assert (similarity_cap(torch.from_numpy(k), config) == 8).all()


def test_zero_keys_are_finite():
    k = torch.zeros(1, 1, 200, 8)
    assert (block_similarity(k, 128, 4) == 0).all()


def test_no_gradient_and_vmap(rng):
    k = torch.from_numpy(smooth_keys(rng, 200)).requires_grad_()
    cap = similarity_cap(k, PSAConfig(**OLD))
    assert not cap.requires_grad
    stacked = torch.stack([k.detach(), k.detach().flip(2)])
    got = torch.vmap(lambda x: similarity_cap(x, PSAConfig(**OLD)))(stacked)
    assert torch.equal(got[0], cap)


def test_opcheck(rng):
    arguments = (torch.from_numpy(smooth_keys(rng, 200)), PSAConfig(**OLD).to_json())
    torch.library.opcheck(torch.ops.psa.similarity_cap.default, arguments)
