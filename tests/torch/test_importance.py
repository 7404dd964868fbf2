"""psa_torch.importance against the NumPy specification."""

import numpy as np
import pytest
import torch

from psa_torch import importance
from psa_torch.importance import block_scores
from shared_specs import PSAConfig
from shared_specs.importance import block_scores as spec_scores

LENGTHS = [(1, 1), (300, 300), (70, 333), (333, 70), (257, 640)]
ESTIMATORS = {
    "pooled 2": {"importance": "pooled", "importance_pool": 2},
    "pooled 4": {"importance": "pooled", "importance_pool": 4},
    "pooled 8": {"importance": "pooled", "importance_pool": 8},
    "sampled": {"importance": "sampled"},
    "sampled few": {"importance": "sampled", "sample_m": 5, "sample_n": 1, "sample_seed": 9},
    "antidiagonal 8": {"importance": "antidiagonal"},
    "antidiagonal 16": {"importance": "antidiagonal", "antidiagonal_stride": 16},
}


def arrays(rng, q_len, kv_len, heads=4, kv_heads=2, d=16):
    q = rng.standard_normal((2, heads, q_len, d)).astype(np.float32)
    k = rng.standard_normal((2, kv_heads, kv_len, d)).astype(np.float32)
    return q, k


def both(q, k, config):
    return block_scores(torch.from_numpy(q), torch.from_numpy(k), config), spec_scores(q, k, config)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_equals_the_specification(estimator, causal, lengths, rng):
    q, k = arrays(rng, *lengths)
    got, want = both(q, k, PSAConfig(causal=causal, **ESTIMATORS[estimator]))
    assert got.dtype == torch.float32 and got.shape == want.shape
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("block_m", [64, 128])
@pytest.mark.parametrize("block_n", [32, 64, 128])
@pytest.mark.parametrize("name", ["pooled 4", "sampled", "antidiagonal 8"])
def test_every_block_size_and_scale(block_m, block_n, name, rng):
    q, k = arrays(rng, 200, 310)
    config = PSAConfig(block_m=block_m, block_n=block_n, scale=-0.7, **ESTIMATORS[name])
    np.testing.assert_allclose(*both(q, k, config), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["pooled 4", "sampled", "antidiagonal 8"])
@pytest.mark.parametrize("chunk", [1, 20_000])
def test_chunks_do_not_change_the_result(causal, name, chunk, rng, monkeypatch):
    q, k = arrays(rng, 700, 450)
    config = PSAConfig(causal=causal, **ESTIMATORS[name])
    whole, _ = both(q, k, config)
    monkeypatch.setattr(importance, "CHUNK_ELEMENTS", chunk)
    torch.testing.assert_close(both(q, k, config)[0], whole, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["pooled 4", "sampled", "antidiagonal 8"])
def test_memory_stays_below_the_square_of_the_length(name):
    """No tensor of the estimate comes near Lq x Lk elements."""
    length = 4096
    q = torch.randn(1, 1, length, 8, generator=torch.Generator().manual_seed(1))

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.elements = max(self.elements, result.numel())
            return result

    config = PSAConfig(**ESTIMATORS[name])
    estimators = {
        "pooled": importance.pooled_scores,
        "sampled": importance.sampled_scores,
        "antidiagonal": importance.antidiagonal_scores,
    }
    with Largest() as seen:
        estimators[config.importance](q, q, config)
    assert 0 < seen.elements <= importance.CHUNK_ELEMENTS < length * length


def test_extreme_logits_stay_finite(rng):
    q, k = arrays(rng, 130, 200)
    for name in ("pooled 4", "sampled", "antidiagonal 8"):
        got, want = both(q * 1e4, k * 1e4, PSAConfig(**ESTIMATORS[name]))
        assert torch.isfinite(got).all()
        np.testing.assert_allclose(got.numpy(), want, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype, rng):
    q, k = (torch.from_numpy(x).to(dtype) for x in arrays(rng, 200, 310))
    got = block_scores(q, k, PSAConfig())
    want = spec_scores(q.double().numpy(), k.double().numpy(), PSAConfig())
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-5, atol=1e-6)


def test_autocast_changes_nothing_inside(rng):
    q, k = (torch.from_numpy(x) for x in arrays(rng, 200, 310))
    want = block_scores(q, k, PSAConfig())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(block_scores(q, k, PSAConfig()), want)


def test_no_gradient_reaches_q_and_k(rng):
    q, k = (torch.from_numpy(x).requires_grad_() for x in arrays(rng, 64, 64))
    scores = block_scores(q, k, PSAConfig())
    assert not scores.requires_grad and scores.grad_fn is None


def test_vmap(rng):
    q, k = (torch.from_numpy(x) for x in arrays(rng, 130, 70))
    stacked = torch.stack([q, q.flip(2)], 1)
    got = torch.vmap(lambda x: block_scores(x, k, PSAConfig()), in_dims=1)(stacked)
    for i in range(2):
        assert torch.equal(got[i], block_scores(stacked[:, i], k, PSAConfig()))


def test_opcheck(rng):
    q, k = (torch.from_numpy(x) for x in arrays(rng, 130, 70))
    arguments = (q, k, PSAConfig(causal=True).to_json())
    torch.library.opcheck(torch.ops.psa.block_scores.default, arguments)
