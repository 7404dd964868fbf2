"""The selection kernel: levels and tables equal to the NumPy rules, integer by integer."""

import numpy as np
import pytest
import torch

from psa_torch.kernels.select import select_levels
from shared_specs import PSAConfig, selection
from tests.torch.kernel_device import to_device, to_numpy

pytestmark = pytest.mark.usefixtures("poisoned_memory")

MODES = ["topk", "thresholdbound"]


def blocks(config, q_len, kv_len):
    return -(-q_len // config.block_m), -(-kv_len // config.block_n)


def steep(rng, shape):
    """Scores like softmax ratios: over many binary orders, largest 1."""
    return np.exp(-rng.exponential(4.0, shape)).astype(np.float32)


def assert_equal_to_rules(scores, config, q_len, kv_len, cap=None):
    want = selection.select_levels(scores, config, q_len=q_len, kv_len=kv_len, cap=cap)
    got = select_levels(
        to_device(scores),
        config,
        q_len=q_len,
        kv_len=kv_len,
        cap=None if cap is None else to_device(cap),
    )
    assert got.dtype == torch.int32 and got.is_contiguous()
    np.testing.assert_array_equal(to_numpy(got), want)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("block_n", "tile_n", "ratios"),
    [
        (64, 32, {1: (0, 0.1), 2: (0.1, 0.15), 4: (0.15, 0.15), 8: (0.15, 0.35), 0: (0.35, 1)}),
        (32, 32, {1: (0, 0.3), 4: (0.3, 0.55), 8: (0.55, 0.9)}),
        (128, 8, {8: (0, 0.2), 0: (0.2, 0.4), 2: (0.4, 0.7), 1: (0.7, 1)}),
    ],
)
def test_modes_and_merge_rounding(rng, mode, block_n, tile_n, ratios):
    config = PSAConfig(block_n=block_n, tile_n=tile_n, mask_ratios=ratios, mask_mode=mode)
    for n_k in (1, 2, 19, 70):
        assert_equal_to_rules(steep(rng, (1, 2, 1, n_k)), config, 100, n_k * block_n - 3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("q_len,kv_len", [(300, 300), (200, 500), (300, 90)])
def test_causal(rng, mode, q_len, kv_len):
    config = PSAConfig(mask_mode=mode, causal=True, block_m=64, block_n=32)
    assert_equal_to_rules(steep(rng, (1, 1, *blocks(config, q_len, kv_len))), config, q_len, kv_len)


@pytest.mark.parametrize("position", ["start", "end"])
@pytest.mark.parametrize("causal", [False, True])
def test_text_and_sinks(rng, position, causal):
    config = PSAConfig(
        text_length=70, text_position=position, sink_blocks=2, causal=causal, block_m=64
    )
    assert_equal_to_rules(steep(rng, (1, 1, *blocks(config, 330, 700))), config, 330, 700)


@pytest.mark.parametrize("mode", MODES)
def test_cap_of_grouped_heads(rng, mode):
    config = PSAConfig(
        block_n=128,
        attn_impl="old_mask_type",
        use_sim_mask=True,
        mask_mode=mode,
        mask_ratios={1: (0, 0.1), 2: (0.1, 0.3), 4: (0.3, 0.5), 8: (0.5, 1.0)},
    )
    cap = rng.choice(np.array([1, 2, 4, 8], np.int32), (2, 2, 21))
    assert_equal_to_rules(steep(rng, (2, 4, 1, 21)), config, 50, 21 * 128, cap)


@pytest.mark.parametrize("mode", MODES)
def test_ties_nan_and_extreme_scores(rng, mode):
    n_k = 40
    rows = np.stack(
        [
            np.round(rng.random(n_k), 1),
            rng.integers(0, 2, n_k),
            np.zeros(n_k),
            np.full(n_k, 0.37),
            np.where(rng.random(n_k) < 0.5, np.nan, rng.random(n_k)),
            np.full(n_k, np.nan),
            np.where(np.arange(n_k) % 2, 0.0, np.nan),  # NaN stands behind zero, too
            rng.random(n_k) * 1e-44,
            rng.random(n_k) * 3e38,
            np.where(np.arange(n_k) == 7, np.inf, rng.random(n_k)),
            -np.zeros(n_k) + (np.arange(n_k) % 3 == 0),
        ]
    ).astype(np.float32)
    config = PSAConfig(mask_mode=mode)
    assert_equal_to_rules(rows[None, :, None], config, 128, n_k * 64)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n_k", [2049, 8192])
def test_long_rows(rng, mode, n_k):
    assert_equal_to_rules(steep(rng, (1, 1, 1, n_k)), PSAConfig(mask_mode=mode), 128, n_k * 64)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_but_skipped_blocks_keeps_the_best(rng, mode):
    config = PSAConfig(mask_ratios={0: (0, 1)}, mask_mode=mode)
    assert_equal_to_rules(steep(rng, (1, 3, 1, 12)), config, 128, 12 * 64)


def test_strided_scores(rng):
    scores = to_device(steep(rng, (1, 30, 2, 2))).permute(0, 3, 2, 1)
    config = PSAConfig()
    got = select_levels(scores, config, q_len=200, kv_len=1920)
    assert torch.equal(got, select_levels(scores.contiguous(), config, q_len=200, kv_len=1920))


def test_bad_input():
    with pytest.raises(TypeError, match="scores must be float32"):
        select_levels(torch.zeros(1, 1, 1, 2).half(), PSAConfig(), q_len=128, kv_len=128)
    with pytest.raises(ValueError, match=r"scores must be \[B, H, 1, 3\]"):
        select_levels(torch.zeros(1, 1, 1, 2), PSAConfig(), q_len=128, kv_len=130)
    with pytest.raises(ValueError, match="cap must be"):
        cap = torch.ones(1, 1, 3, dtype=torch.int32)
        select_levels(torch.zeros(1, 1, 1, 2), PSAConfig(), q_len=128, kv_len=128, cap=cap)
