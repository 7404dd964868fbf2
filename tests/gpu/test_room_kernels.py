"""The kernels around attention on a CUDA device: real lengths, no waiting, 64-bit offsets."""

import pytest
import torch

from psa_torch import PSAConfig
from psa_torch.attention.triton.plan import key_plan, query_plan
from psa_torch.importance import block_scores
from psa_torch.pyramid import build_pyramid
from psa_torch.selection import select_levels
from psa_torch.similarity import similarity_cap
from psa_torch.table import build_table
from shared_specs.geometry import Geometry

pytestmark = pytest.mark.gpu

CONFIGS = {
    "topk": PSAConfig(),
    "thresholdbound": PSAConfig(mask_mode="thresholdbound"),
    "sampled": PSAConfig(importance="sampled"),
    "causal": PSAConfig(causal=True, sink_blocks=1),
    "antidiagonal": PSAConfig(importance="antidiagonal", causal=True),
}


def tokens(heads, length, head_dim, seed, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(1, heads, length, head_dim, generator=generator, device="cuda", dtype=dtype)
    # Neighbours alike, as in real sequences: every level and cap is met.
    return x + 2 * x[:, :, ::64].repeat_interleave(64, 2)[:, :, :length]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 0.9999), (torch.bfloat16, 0.998)])
def test_levels_agree_with_plain_arithmetic(name, dtype, share):
    config, length = CONFIGS[name], 10_001
    q, k = tokens(4, length, 128, 1, dtype), tokens(2, length, 128, 2, dtype)
    # float64 stays with plain torch.
    want, got = (
        select_levels(block_scores(*pair, config), config, q_len=length, kv_len=length)
        for pair in ((q.double(), k.double()), (q, k))
    )
    assert (want == got).float().mean() >= share


def test_selection_equals_the_rules_at_length():
    from shared_specs import selection

    length = 75_600
    scores = torch.rand(1, 2, 4, 1_182, device="cuda").pow(8)
    for name in ("topk", "thresholdbound"):
        sizes = {"q_len": 500, "kv_len": length}
        got = select_levels(scores, CONFIGS[name], **sizes).cpu().numpy()
        assert (got == selection.select_levels(scores.cpu().numpy(), CONFIGS[name], **sizes)).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_waits_for_the_device(name):
    config, length = CONFIGS[name], 3_001
    q, k, v = (tokens(2, length, 64, seed) for seed in range(3))
    sizes = {"q_len": length, "kv_len": length}
    geometry = Geometry(length, length, config.block_m, config.block_n, config.causal)

    def everything():
        build_pyramid(k, v, config.block_n)
        scores = block_scores(q, k, config)
        cap = similarity_cap(k, config)
        levels = select_levels(scores, config, **sizes, cap=cap)
        build_table(levels)
        query_plan(levels, geometry)
        key_plan(levels, geometry)

    everything()  # compiles, and copies the sampling plan
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_offsets_past_two_to_the_31():
    """The last head of a tensor of 2.2e9 elements comes out as it does alone."""
    heads, length = 132, 131_072
    k = torch.empty(1, heads, length, 128, device="cuda", dtype=torch.bfloat16)
    k[:, -1:] = tokens(1, length, 128, 7)
    last = k[:, -1:].clone()
    for config in (CONFIGS["topk"], CONFIGS["sampled"]):
        got = block_scores(k, k, config)[:, -1:]
        assert torch.equal(got, block_scores(last, last, config))
    assert torch.equal(
        similarity_cap(k, CONFIGS["topk"])[:, -1:], similarity_cap(last, CONFIGS["topk"])
    )
    whole = build_pyramid(k, k, 64)
    alone = build_pyramid(last, last, 64)
    assert torch.equal(whole.k[:, -1:], alone.k) and torch.equal(whole.v[:, -1:], alone.v)
