"""A batch of nothing gives nothing, as PyTorch's own attention does."""

import pytest
import torch

from psa_torch import PSAVideoAttention, VideoState, psa_attention, sparse_attention
from shared_specs import PSAConfig

CONFIGS = [
    PSAConfig(),
    PSAConfig(importance="antidiagonal", causal=True),
    PSAConfig(block_n=128, attn_impl="old_mask_type", use_sim_mask=True),
    PSAConfig(rearrange_method="Gilbert", grid=(2, 8, 10)),
    PSAConfig(rearrange_method="SemanticAware", grid=(2, 8, 10)),
    PSAConfig(rearrange_method="Clusters", grid=(2, 8, 10)),
]


def empty():
    return [torch.empty(0, heads, 160, 16, requires_grad=True) for heads in (4, 2, 2)]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_chosen_levels(config):
    qkv = empty()
    out, lse, levels = psa_attention(*qkv, config=config, return_lse=True, return_levels=True)
    assert out.shape == (0, 4, 160, 16) and lse.shape == (0, 4, 160)
    assert levels.shape[:2] == (0, 4) and levels.dtype == torch.int32
    for x, grad in zip(qkv, torch.autograd.grad(out.sum() + lse.sum(), qkv), strict=True):
        assert grad.shape == x.shape
    state = VideoState()
    layer = PSAVideoAttention(config, warmup_steps=1, state=state)
    for state.step in range(3):
        assert layer(*qkv).shape == out.shape


def test_given_levels():
    levels = torch.empty(0, 4, 2, 3, dtype=torch.int32)
    qkv = empty()
    out = sparse_attention(*qkv, levels, block_m=128, block_n=64)
    assert out.shape == (0, 4, 160, 16)
    moved = torch.func.jvp(
        lambda q: sparse_attention(q, *qkv[1:], levels, block_m=128, block_n=64),
        (qkv[0],),
        (qkv[0],),
    )[1]
    assert moved.shape == out.shape


def test_what_does_not_fit_is_still_refused():
    q, k, v = empty()
    with pytest.raises(ValueError, match="k must have the batch of q, 0, got 1"):
        psa_attention(q, torch.ones(1, 2, 160, 16), torch.ones(1, 2, 160, 16))
    with pytest.raises(ValueError, match="heads of q must be a multiple"):
        psa_attention(q[:, :3], k, v)
