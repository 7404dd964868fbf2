"""`FlopCounterMode` counts the products of attention."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from psa_torch import psa_attention, sparse_attention
from shared_specs.flops import attention_flops


def test_counts_are_those_of_the_specification(rng):
    q, k, v = (
        torch.from_numpy(rng.normal(size=(1, heads, 300, 16))).requires_grad_()
        for heads in (4, 2, 2)
    )
    levels = torch.from_numpy(rng.choice([0, 1, 2, 4, 8], (1, 4, 3, 5)).astype("int32"))
    sizes = {"block_m": 128, "block_n": 64}
    expected = attention_flops(levels.numpy(), 300, 300, 16, **sizes)
    with FlopCounterMode(display=False) as counter:
        out = sparse_attention(q, k, v, levels, **sizes)
    assert counter.get_total_flops() == expected > 0
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == expected * 5 // 2
    with FlopCounterMode(display=False) as counter:
        psa_attention(q.detach(), k.detach(), v.detach())
    assert counter.get_total_flops() > 0


def test_level_1_counts_as_dense_attention(rng):
    q = torch.from_numpy(rng.normal(size=(1, 2, 256, 16)))
    levels = torch.ones(1, 2, 2, 4, dtype=torch.int32)
    with FlopCounterMode(display=False) as counter:
        sparse_attention(q, q, q, levels, block_m=128, block_n=64)
    assert counter.get_total_flops() == 4 * 2 * 256 * 256 * 16


def test_values_of_another_head_dimension_count_by_theirs(rng):
    """MLA: keys of 192, values of 128."""
    q, v = (torch.from_numpy(rng.normal(size=(1, 2, 256, d))).requires_grad_() for d in (192, 128))
    levels = torch.ones(1, 2, 2, 4, dtype=torch.int32)
    pairs = 2 * 256 * 256
    with FlopCounterMode(display=False) as counter:
        out = sparse_attention(q, q, v, levels, block_m=128, block_n=64)
    assert counter.get_total_flops() == 2 * pairs * (192 + 128)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * pairs * (3 * 192 + 2 * 128)


def test_sequences_count_as_they_would_alone(rng):
    q, k = (torch.from_numpy(rng.normal(size=(3, 2, n, 16))).requires_grad_() for n in (256, 192))
    levels = torch.from_numpy(rng.choice([0, 1, 2, 4, 8], (3, 2, 2, 3)).astype("int32"))
    sizes = {"block_m": 128, "block_n": 64}
    q_lens, kv_lens = torch.tensor([130, 0, 256]), torch.tensor([100, 192, 7])
    with FlopCounterMode(display=False) as counter:
        out = sparse_attention(q, k, k, levels, q_lens=q_lens, kv_lens=kv_lens, **sizes)
    expected = attention_flops(levels[:1, :, :, :2].numpy(), 130, 100, 16, **sizes)
    expected += attention_flops(levels[2:, :, :, :1].numpy(), 256, 7, 16, **sizes)
    assert counter.get_total_flops() == expected > 0
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == expected * 5 // 2
