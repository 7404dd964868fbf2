"""The signature of PyTorch's scaled_dot_product_attention."""

import inspect

import pytest
import torch
import torch.nn.functional as F

from psa_torch import psa_attention, scaled_dot_product_attention
from shared_specs import PSAConfig

DENSE = PSAConfig(mask_ratios={1: (0.0, 1.0)})


def make_qkv(rng, length=200, kv_heads=2):
    q = torch.from_numpy(rng.normal(size=(1, 4, length, 16)))
    return q, *(torch.from_numpy(rng.normal(size=(1, kv_heads, 200, 16))) for _ in range(2))


@pytest.mark.parametrize("is_causal", [False, True])
def test_all_level_1_is_that_of_pytorch(rng, is_causal):
    qkv = make_qkv(rng)
    given = (None, 0.0, is_causal)
    found = scaled_dot_product_attention(*qkv, *given, scale=0.3, enable_gqa=True, config=DENSE)
    expected = F.scaled_dot_product_attention(*qkv, *given, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(found, expected)
    found = scaled_dot_product_attention(*qkv, is_causal=is_causal, enable_gqa=True)
    torch.testing.assert_close(found, psa_attention(*qkv, causal=is_causal))


def test_arguments_stand_where_pytorch_has_them():
    names = list(inspect.signature(scaled_dot_product_attention).parameters)
    assert names == [
        *("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"),
        "config",
    ]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"attn_mask": torch.ones(1)}, ValueError, "attn_mask must be None"),
        ({"dropout_p": 0.1}, ValueError, "dropout_p must be 0: .* got 0.1"),
        ({"is_causal": 1}, TypeError, "is_causal must be True or False"),
        ({"enable_gqa": False}, ValueError, "enable_gqa must be True .* 4 and 2"),
        ({"query": "q"}, TypeError, "query must be a torch.Tensor"),
    ],
)
def test_what_would_change_the_result_is_refused(rng, options, error, message):
    given = dict(zip(("query", "key", "value"), make_qkv(rng), strict=True), enable_gqa=True)
    with pytest.raises(error, match=message):
        scaled_dot_product_attention(**{**given, **options})


def test_unequal_lengths_are_not_causal_as_in_pytorch(rng):
    with pytest.raises(ValueError, match="is_causal=True needs as many queries as keys"):
        scaled_dot_product_attention(*make_qkv(rng, 100, 4), is_causal=True)


def test_psa_attention_takes_what_changes_nothing(rng):
    qkv = make_qkv(rng)
    found = psa_attention(*qkv, attn_mask=None, dropout_p=0.0, is_causal=False)
    assert torch.equal(found, psa_attention(*qkv))
    with pytest.raises(ValueError, match="the field causal of the configuration"):
        psa_attention(*qkv, is_causal=True)
