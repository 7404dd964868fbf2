"""The score kernels against the NumPy specification, which sums in float64."""

import numpy as np
import pytest
import torch

from psa_torch.kernels.scores import block_scores
from psa_torch.kernels.scores.means import pool_blocks
from psa_torch.kernels.scores.tiles import ScoreConfig
from shared_specs import PSAConfig, importance, pyramid, selection
from tests.torch.kernel_device import to_device, to_numpy

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # log2(0) = -inf is meant: a block whose every weight underflows adds nothing.
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log2"),
]

ESTIMATORS = {
    "pooled by 4": {},
    "pooled by 8": {"importance_pool": 8},
    "pooled by 2, negative scale": {"importance_pool": 2, "scale": -0.4},
    "sampled": {"importance": "sampled"},
    "sampled, odd counts": {"importance": "sampled", "sample_m": 13, "sample_n": 5},
    "sampled, one key": {"importance": "sampled", "sample_m": 1, "sample_n": 1, "sample_seed": 3},
    "antidiagonal": {"importance": "antidiagonal"},
    "antidiagonal 16": {"importance": "antidiagonal", "antidiagonal_stride": 16, "scale": 0.05},
    "antidiagonal 2": {"importance": "antidiagonal", "antidiagonal_stride": 2, "scale": -0.1},
}


def inputs(rng, q_len, kv_len, head_dim, heads=2, kv_heads=1, dtype=torch.float32):
    """[B, L, H, D] seen as [B, H, L, D]: no stride is the contiguous one."""
    q = rng.standard_normal((1, q_len, heads, head_dim))
    k = rng.standard_normal((1, kv_len, kv_heads, head_dim))
    return [to_device(x, dtype).transpose(1, 2) for x in (q, k)]


def specified(q, k, config):
    return importance.block_scores(to_numpy(q), to_numpy(k), config)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("q_len", "kv_len", "block_m", "block_n"),
    [(300, 330, 128, 64), (333, 150, 64, 32), (70, 300, 64, 128)],
)
def test_equals_the_specification(rng, estimator, causal, q_len, kv_len, block_m, block_n):
    config = PSAConfig(block_m=block_m, block_n=block_n, causal=causal, **ESTIMATORS[estimator])
    q, k = inputs(rng, q_len, kv_len, 24)
    got = to_numpy(block_scores(q, k, config))
    assert got.dtype == np.float32
    want = specified(q, k, config)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)
    assert (got[want == 0] == 0).all()


@pytest.mark.parametrize("estimator", ["pooled by 4", "sampled", "antidiagonal"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(rng, estimator, dtype):
    """Products of 16-bit tokens are exact; means are kept to float16's precision."""
    config = PSAConfig(**ESTIMATORS[estimator])
    q, k = inputs(rng, 260, 390, 64, dtype=dtype)
    want = specified(q, k, config)
    np.testing.assert_allclose(to_numpy(block_scores(q, k, config)), want, rtol=3e-3, atol=1e-6)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_means_keep_the_range_of_bfloat16(rng, size):
    config = PSAConfig(scale=0.3)
    q, k = inputs(rng, 130, 260, 32, dtype=torch.bfloat16)
    want = block_scores(q, k, config)
    # Powers of two, so that nothing but range is at stake.
    factor = 2.0 ** round(np.log2(size))
    got = block_scores(q * factor, k / factor, config)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_scale_zero_ranks_what_is_visible_and_nothing_else(rng):
    config = PSAConfig(scale=0.0, causal=True, block_m=64, block_n=32)
    q, k = inputs(rng, 200, 200, 16)
    np.testing.assert_array_equal(to_numpy(block_scores(q, k, config)), specified(q, k, config))


@pytest.mark.parametrize("importance_name", ["pooled", "antidiagonal"])
def test_long_rows_and_items_of_one_program(rng, importance_name):
    """More key blocks than one sweep of the slab, more items than programs."""
    config = PSAConfig(importance=importance_name, block_m=64, block_n=32, causal=True)
    q, k = inputs(rng, 450, 2500, 16, heads=3, kv_heads=3)
    np.testing.assert_allclose(
        to_numpy(block_scores(q, k, config)), specified(q, k, config), rtol=2e-5, atol=2e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_levels_agree_end_to_end(rng, dtype):
    config = PSAConfig(block_m=64, block_n=32)
    q, k = inputs(rng, 2048, 2048, 32, heads=2, kv_heads=2, dtype=dtype)
    want, got = (
        selection.select_levels(scores, config, q_len=2048, kv_len=2048)
        for scores in (specified(q, k, config), to_numpy(block_scores(q, k, config)))
    )
    assert (want == got).mean() >= 0.999


@pytest.mark.parametrize("length", [1, 66, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooling(rng, length, dtype):
    x = to_device(rng.standard_normal((2, 2, length, 24)), dtype)
    x[0] *= 1e-20
    rows, scale = pool_blocks(x.transpose(0, 1), 64, 4)
    got = rows.float()
    if scale is not None:
        assert (scale.log2() == scale.log2().round()).all() and got.abs().max() < 2
        got = got * scale.repeat_interleave(16, 2)[..., None]
    want = pyramid.group_means(to_numpy(x).swapaxes(0, 1), 4)
    missing = -(-length // 64) * 16 - want.shape[2]
    want = np.pad(want, [(0, 0), (0, 0), (0, missing), (0, 0)], mode="edge")
    largest = np.abs(want).max((2, 3), keepdims=True)
    step = 1e-6 if dtype == torch.float32 else 2.0**-11
    assert (np.abs(to_numpy(got) - want) <= step * largest).all()


def test_refuses_other_dtypes():
    q = torch.zeros(1, 1, 8, 16, dtype=torch.float64)
    with pytest.raises(TypeError, match="q must be float16, bfloat16, float32"):
        block_scores(q, q, PSAConfig())
    with pytest.raises(TypeError, match="k must be float16"):
        block_scores(q.half(), q.bfloat16(), PSAConfig())


def test_tiles_never_split_a_block(rng, monkeypatch):
    """Blocks with more rows than a tile has widen the tile."""
    small = ScoreConfig(rows=16, columns=16, warps=4, stages=1, per_processor=1)
    monkeypatch.setattr("psa_torch.kernels.scores.tiles.choose_peak", lambda *_: small)
    q, k = inputs(rng, 200, 260, 16)
    config = PSAConfig(importance_pool=2)
    np.testing.assert_allclose(
        to_numpy(block_scores(q, k, config)), specified(q, k, config), rtol=2e-5, atol=2e-6
    )
