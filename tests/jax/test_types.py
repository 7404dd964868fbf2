"""The typed keywords of the public calls are those of their signatures."""

import inspect

import pytest

import psa_jax
from psa_jax import _types

FLAGS = {"return_lse", "return_levels"}


@pytest.mark.parametrize(
    ("function", "keywords"),
    [
        (psa_jax.psa_attention, _types.CallArguments),
        (psa_jax.sparse_attention, _types.SparseArguments),
        (psa_jax.PSAAttention.__call__, _types.ModuleArguments),
        (psa_jax.PSAVideoAttention.__call__, _types.VideoArguments),
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
