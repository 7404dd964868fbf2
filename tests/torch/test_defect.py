"""Estimated defects against the float64 rule."""

import numpy as np
import pytest
import torch

from psa_torch import defect
from shared_specs.defect import defect_scores


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rest_mean", [False, True])
@pytest.mark.parametrize("chunk", [1, 1 << 22])
def test_against_the_rule(causal, rest_mean, chunk, rng, monkeypatch):
    monkeypatch.setattr(defect, "CHUNK_ELEMENTS", chunk)
    q = rng.standard_normal((2, 4, 299, 16), np.float32)
    k = rng.standard_normal((2, 2, 333, 16), np.float32)
    settings = {"block_m": 64, "block_n": 32, "sample_m": 4, "scale": 0.7}
    settings |= {"causal": causal, "rest_mean": rest_mean}
    expected = defect_scores(q, k, **settings)
    found = defect.defect_scores(torch.from_numpy(q), torch.from_numpy(k), **settings)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-9)
