"""Which kernel a call gets, by GPU, head dimension, dtype and block sizes."""

import dataclasses

import pytest
import torch

from psa_torch.attention.triton import configs
from psa_torch.attention.triton.configs import (
    CoarseGradConfig,
    ForwardConfig,
    HopperForwardConfig,
    HopperKeyGradConfig,
    HopperQueryGradConfig,
    KeyGradConfig,
    QueryGradConfig,
)
from psa_torch.kernels.scores import tiles
from psa_torch.kernels.scores.tiles import HopperScoreConfig, ScoreConfig
from shared_specs import PSAConfig

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
KEY, POOLED, HOPPER_KEY = KeyGradConfig, CoarseGradConfig, HopperKeyGradConfig
PLAIN = (ForwardConfig, QueryGradConfig)
HOPPER = (HopperForwardConfig, HopperQueryGradConfig)

ATTENTION = [
    # capability, D, dtype, block_m, block_n: forward, dq, then dk and dv of levels 1, 2, 4, 8
    ((9, 0), 64, HALF, 128, 64, *HOPPER, HOPPER_KEY, KEY, KEY, POOLED),
    ((9, 0), 64, BRAIN, 128, 128, *HOPPER, HOPPER_KEY, KEY, KEY, POOLED),
    ((9, 0), 128, BRAIN, 128, 64, *HOPPER, HOPPER_KEY, HOPPER_KEY, KEY, POOLED),
    ((9, 0), 128, HALF, 128, 128, *HOPPER, HOPPER_KEY, HOPPER_KEY, KEY, POOLED),
    ((9, 0), 128, BRAIN, 128, 32, *HOPPER, HOPPER_KEY, KEY, POOLED, POOLED),
    ((9, 0), 72, BRAIN, 128, 64, *HOPPER, HOPPER_KEY, HOPPER_KEY, KEY, POOLED),
    ((9, 0), 40, HALF, 128, 64, *HOPPER, HOPPER_KEY, KEY, KEY, POOLED),
    ((9, 0), 24, BRAIN, 128, 64, *PLAIN, KEY, KEY, KEY, POOLED),
    ((9, 0), 192, BRAIN, 128, 64, *PLAIN, KEY, KEY, KEY, POOLED),
    ((9, 0), 128, BRAIN, 64, 64, *PLAIN, KEY, KEY, KEY, POOLED),
    ((9, 0), 128, SINGLE, 128, 64, *PLAIN, KEY, KEY, KEY, POOLED),
    ((9, 0), 32, BRAIN, 128, 64, *PLAIN, KEY, KEY, KEY, POOLED),
    ((9, 0), 256, BRAIN, 128, 64, *PLAIN, KEY, KEY, KEY, POOLED),
    ((8, 0), 128, BRAIN, 128, 64, *PLAIN, KEY, KEY, KEY, POOLED),
    ((8, 9), 64, HALF, 128, 64, *PLAIN, KEY, KEY, KEY, POOLED),
    ((10, 0), 128, BRAIN, 128, 64, *PLAIN, KEY, KEY, KEY, POOLED),
    ((12, 0), 128, BRAIN, 128, 64, *PLAIN, KEY, KEY, KEY, POOLED),
]


@dataclasses.dataclass
class OnGPU:
    """As much of a tensor on a GPU as the choice looks at."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    is_cuda: bool = True
    device: torch.device = torch.device("cuda", 0)


@pytest.mark.parametrize("row", ATTENTION, ids=str)
def test_of_attention(row, monkeypatch):
    capability, head_dim, dtype, block_m, block_n, *want = row
    monkeypatch.setattr(configs, "capability", lambda _: capability)
    q = OnGPU((1, 2, 4096, head_dim), dtype)
    backward = configs.backward_config(q, q, block_m, block_n)
    chosen = (configs.forward_config(q, q, block_m, block_n), backward.query, *backward.key)
    assert [type(config) for config in chosen] == want


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_interpreter_gets_kernels_that_it_can_run(head_dim):
    q = torch.empty(1, 2, 256, head_dim, dtype=BRAIN)
    backward = configs.backward_config(q, q, 128, 64)
    chosen = (configs.forward_config(q, q, 128, 64), backward.query, *backward.key)
    assert [type(config) for config in chosen] == [*PLAIN, KEY, KEY, KEY, POOLED]


SCORES = [
    # capability, D, dtype, keys, block_m, block_n: kernel
    ((9, 0), 64, HALF, 16384, 128, 64, HopperScoreConfig),
    ((9, 0), 128, BRAIN, 16384, 128, 64, HopperScoreConfig),
    ((9, 0), 128, BRAIN, 8192, 64, 64, HopperScoreConfig),
    ((9, 0), 128, BRAIN, 8064, 128, 64, ScoreConfig),
    ((9, 0), 128, BRAIN, 8192, 128, 128, ScoreConfig),
    ((9, 0), 128, SINGLE, 16384, 128, 64, ScoreConfig),
    ((9, 0), 96, BRAIN, 16384, 128, 64, ScoreConfig),
    ((8, 0), 128, BRAIN, 16384, 128, 64, ScoreConfig),
    ((10, 0), 128, BRAIN, 16384, 128, 64, ScoreConfig),
]


@pytest.mark.parametrize("row", SCORES, ids=str)
def test_of_scores(row, monkeypatch):
    capability, head_dim, dtype, keys, block_m, block_n, want = row
    monkeypatch.setattr(tiles, "capability", lambda _: capability)
    config = PSAConfig(block_m=block_m, block_n=block_n)
    q, k = (OnGPU((1, 2, length, head_dim), dtype) for length in (1000, keys))
    assert type(tiles.peak_tile(q, k, block_m // config.importance_pool, config)) is want
