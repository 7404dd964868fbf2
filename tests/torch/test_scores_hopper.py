"""The warp-specialised scores run as threads: right answers, no deadlock, no early release."""

from unittest import mock

import numpy as np
import pytest
import torch

from psa_torch.kernels import scores
from psa_torch.kernels.scores import peaks, tiles
from psa_torch.kernels.scores.tiles import HopperScoreConfig
from shared_specs import PSAConfig
from shared_specs.importance import block_scores
from tests.support import gluon_interpreter

hopper = pytest.importorskip("psa_torch.kernels.scores.hopper.kernel")

TILE = HopperScoreConfig(stages=2, columns=16)


@pytest.fixture(autouse=True)
def interpreted():
    kernel = gluon_interpreter.Interpreted(hopper.peak_kernel_hopper)
    with (
        mock.patch.object(hopper, "peak_kernel_hopper", kernel),
        mock.patch.object(peaks, "peak_tile", tile),
    ):
        yield


def tile(q, k, q_count, config):
    """Narrow tiles, so that there are several; as wide as they are where steps must be cut."""
    return TILE if q_count <= 32 else TILE._replace(columns=128)


CASES = {
    "ragged grouped": (PSAConfig(), 4, 2, 300, 1400),
    "pool 2": (PSAConfig(importance_pool=2, block_n=32), 1, 1, 300, 4500),
    "pool 8, causal": (PSAConfig(importance_pool=8, causal=True), 2, 1, 1500, 1700),
    "causal, more queries": (PSAConfig(causal=True, block_n=32), 1, 1, 1500, 300),
    "causal, tiles that no row sees": (PSAConfig(causal=True), 1, 1, 2500, 2501),
    "sampled": (PSAConfig(importance="sampled", sample_m=12, sample_n=5), 2, 2, 260, 1100),
    "sampled causal": (PSAConfig(importance="sampled", block_m=64, causal=True), 1, 1, 500, 1345),
    "negative scale": (PSAConfig(scale=-0.2, block_n=128), 1, 1, 200, 2500),
}


def draw(rng, case, dtype=torch.float32):
    config, heads, kv_heads, q_len, kv_len = case
    shapes = ((2, heads, q_len, 64), (2, kv_heads, kv_len, 64))
    return [torch.from_numpy(rng.standard_normal(s)).to(dtype) for s in shapes]


@pytest.mark.parametrize("name", CASES)
def test_against_the_specification(name, rng):
    config = CASES[name][0]
    q, k = draw(rng, CASES[name])
    with mock.patch.object(torch, "empty", poisoned):
        got = scores.block_scores(q, k, config)
    want = block_scores(q.double().numpy(), k.double().numpy(), config)
    np.testing.assert_allclose(got.numpy(), want, rtol=2e-5, atol=1e-7)


def test_scaled_means_of_half_precision(rng):
    """Factors of the blocks meet their own blocks: the inputs' sizes differ by block."""
    config = PSAConfig(causal=True)
    q, k = draw(rng, (config, 2, 1, 900, 1500))
    k *= torch.exp2(torch.arange(1500) // 64 % 5 * 2.0)[:, None] / 16
    q, k = q.half(), k.half()
    got = scores.block_scores(q, k, config)
    want = block_scores(q.double().numpy(), k.double().numpy(), config)
    np.testing.assert_allclose(got.numpy(), want, rtol=0.05, atol=2e-3)


BARRIERS = ("q_full", "full", "empty", "done", "landed", "tile_read", "tile_free")
"""As the kernel allocates them."""


@pytest.mark.parametrize("deaf", BARRIERS)
def test_a_missing_wait_is_noticed(deaf, rng):
    # Several items a program, room for columns of the next one while one is multiplied, and
    # tiles enough to run ahead by.
    case = (PSAConfig(importance_pool=8, block_n=32), 1, 1, 2600, 4000)
    q, k = draw(rng, case)
    roomy = TILE._replace(stages=6)
    with (
        mock.patch.object(peaks, "peak_tile", lambda *_: roomy),
        mock.patch.object(hopper, "resident_programs", lambda *_: 1),
        mock.patch.object(torch, "empty", poisoned),
    ):
        want = scores.block_scores(q, k, case[0])
        with (
            pytest.raises((AssertionError, TimeoutError)),
            gluon_interpreter.deaf_barrier(
                BARRIERS.index(deaf), of_copies=deaf in ("q_full", "full", "landed")
            ),
        ):
            torch.testing.assert_close(scores.block_scores(q, k, case[0]), want)


def test_strided_queries(rng):
    config = PSAConfig(importance="sampled")
    q, k = draw(rng, (config, 2, 1, 300, 1100))
    want = scores.block_scores(q, k, config)
    strided = q.transpose(2, 3).contiguous().transpose(2, 3)
    got = scores.block_scores(strided, k, config)
    torch.testing.assert_close(got, want)


def test_calls_that_the_kernel_does_not_take():
    """float32, head dimensions without a tile, wide query blocks, few key blocks."""
    assert tiles.fits_hopper(torch.bfloat16, 128, 64, 128)
    assert not tiles.fits_hopper(torch.float32, 128, 64, 128)
    assert not tiles.fits_hopper(torch.bfloat16, 96, 64, 128)
    assert not tiles.fits_hopper(torch.bfloat16, 128, 128, 128)
    assert not tiles.fits_hopper(torch.bfloat16, 128, 64, 127)


def poisoned(*args, **kwargs):
    """`torch.empty` full of NaN."""
    return torch.full(args, float("nan"), **kwargs)
