"""The similarity kernel against the NumPy specification."""

import numpy as np
import pytest
import torch

from psa_torch.kernels.similarity import similarity_cap
from shared_specs import PSAConfig, similarity
from tests.torch.kernel_device import to_device, to_numpy

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def alike_in_part(rng, shape, block_n):
    """Noise around one direction a head, little of it in some blocks and much in others."""
    directions = rng.standard_normal((*shape[:2], 1, shape[3]))
    noise = rng.choice([0.1, 0.5, 0.8, 2.0], -(-shape[2] // block_n)).repeat(block_n)
    return (directions + rng.standard_normal(shape) * noise[: shape[2], None]).astype(np.float32)


@pytest.mark.parametrize("block_n", [32, 64, 128])
@pytest.mark.parametrize("length", [1, 3, 300, 901])
def test_equals_the_specification(rng, length, block_n):
    k = alike_in_part(rng, (1, 2, length, 24), block_n)
    thresholds = (0.8, 0.7, 0.6)
    config = PSAConfig(
        block_n=block_n,
        **{f"sim_{n}x_threshold": x for n, x in zip((2, 4, 8), thresholds, strict=True)},
    )
    got = similarity_cap(to_device(k).transpose(1, 2).contiguous().transpose(1, 2), config)
    want = similarity.similarity_cap(k, config)
    assert got.dtype == torch.int32
    np.testing.assert_array_equal(to_numpy(got), want)
    if length > 300:
        assert len(np.unique(want)) > 1


def test_half_precision_and_zero_keys(rng):
    k = to_device(alike_in_part(rng, (1, 1, 256, 16), 64), torch.bfloat16)
    k[:, :, 64:128] = 0
    config = PSAConfig(sim_8x_threshold=0.5)
    want = similarity.similarity_cap(to_numpy(k), config)
    np.testing.assert_array_equal(to_numpy(similarity_cap(k, config)), want)
    assert want[0, 0, 1] == 1
