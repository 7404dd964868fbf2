"""The typed keywords of the public calls are those of their signatures."""

import inspect

import pytest

import psa_torch
from psa_torch import _types
from psa_torch.distributed import call

FLAGS = {"return_lse", "return_levels"}


@pytest.mark.parametrize(
    ("function", "keywords"),
    [
        (psa_torch.psa_attention, _types.CallArguments),
        (psa_torch.sparse_attention, _types.SparseArguments),
        (psa_torch.PSAAttention.forward, _types.ModuleArguments),
        (psa_torch.PSAVideoAttention.forward, _types.VideoArguments),
        (call.psa_attention, call.CallArguments),
    ],
    ids=lambda x: getattr(x, "__qualname__", ""),
)
def test_keywords(function, keywords):
    signature = inspect.signature(function).parameters.values()
    kinds = {kind: {x.name for x in signature if x.kind is kind} for kind in inspect._ParameterKind}
    named = kinds[inspect.Parameter.KEYWORD_ONLY] - FLAGS
    if kinds[inspect.Parameter.VAR_KEYWORD]:
        named |= _types.Overrides.__optional_keys__
    assert named == keywords.__required_keys__ | keywords.__optional_keys__
