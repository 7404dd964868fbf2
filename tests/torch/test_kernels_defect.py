"""The defect kernels, interpreted on the CPU, against the float64 rule."""

import numpy as np
import pytest
import torch

from psa_torch.kernels.defect import defect_scores
from shared_specs import defect
from tests.torch.kernel_device import to_device, to_numpy

CASES = {
    "default": ((1, 2, 300, 32), (1, 1, 700, 32), {}),
    "ragged, grouped": ((2, 4, 299, 16), (2, 2, 333, 16), {"block_n": 32, "sample_m": 4}),
    "three keys": ((1, 1, 130, 8), (1, 1, 3, 8), {"sample_m": 1}),
    "causal": ((1, 2, 333, 24), (1, 1, 333, 24), {"causal": True, "sample_m": 16}),
    "causal past": ((1, 1, 100, 16), (1, 1, 260, 16), {"causal": True, "block_n": 128}),
    "causal unseen": ((1, 1, 230, 16), (1, 1, 100, 16), {"causal": True}),
    "skipped": ((1, 1, 200, 16), (1, 1, 200, 16), {"rest_mean": False}),
    "every query": ((1, 1, 70, 16), (1, 1, 90, 16), {"block_m": 64, "sample_m": 64}),
}
SETTINGS = {
    "block_m": 128, "block_n": 64, "sample_m": 8, "scale": 0.7, "causal": False, "rest_mean": True,
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_against_the_rule(case, rng, poisoned_memory):
    q_shape, k_shape, changed = CASES[case]
    q, k = rng.standard_normal(q_shape, np.float32), rng.standard_normal(k_shape, np.float32)
    settings = {**SETTINGS, **changed}
    found = to_numpy(defect_scores(to_device(q), to_device(k), **settings))
    expected = defect.defect_scores(q, k, **settings)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-9)
    assert (expected > 0).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_of_16_bits_it_takes_the_numbers_as_they_are(dtype, rng):
    q, k = (to_device(rng.standard_normal((1, 2, 256, 16)), dtype) for _ in "qk")
    expected = defect.defect_scores(to_numpy(q), to_numpy(k), **SETTINGS)
    np.testing.assert_allclose(
        to_numpy(defect_scores(q, k, **SETTINGS)), expected, rtol=2e-3, atol=1e-9
    )


def test_large_logits_and_strides(rng):
    q, k = (to_device(rng.standard_normal((1, 200, 2, 16), np.float32)) * 30 for _ in "qk")
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    found = to_numpy(defect_scores(q, k, **SETTINGS))
    expected = defect.defect_scores(to_numpy(q), to_numpy(k), **SETTINGS)
    np.testing.assert_allclose(found, expected, rtol=2e-2, atol=1e-7)
    again = to_numpy(defect_scores(q, k, **SETTINGS))
    np.testing.assert_array_equal(found, again)
