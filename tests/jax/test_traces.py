"""How often a call is traced: once for equal configurations, however written, and for new values.

A configuration whose hash or equality broke would compile every call anew, and nothing else would
show it. What is counted is calls, with traced arguments, of a function that every trace of an
entry point passes by.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax import attention, functional, psa_attention, sparse_attention
from psa_jax.masks import to_segments
from shared_specs.config import PSAConfig

FIELDS = {"block_m": 64, "block_n": 32, "causal": True, "mask_ratios": {1: (0, 0.5), 8: (0.5, 1)}}
CONFIG = PSAConfig(**FIELDS)
OTHER = PSAConfig(**FIELDS, sample_seed=1)
"""Another configuration, though no number that it computes is another."""


@pytest.fixture
def lengths():
    """A length that no other test has used: what was traced for it elsewhere would not be again."""
    return next(_LENGTHS)


_LENGTHS = iter(range(65, 129))


@pytest.fixture
def once(monkeypatch):
    """Fails at the second trace of `psa_attention` or of `sparse_attention`."""
    chex.clear_trace_counter()
    for module, name in ((functional, "sparse_attention"), (attention, "vary_alike")):
        counted = chex.assert_max_traces(getattr(module, name), n=1)
        monkeypatch.setattr(module, name, counted)


def inputs(rng, length):
    return (jnp.asarray(rng.standard_normal((1, 2, length, 8)), jnp.float32) for _ in range(3))


WRITTEN = {
    "keywords": FIELDS,
    "an object": {"config": PSAConfig(**FIELDS)},
    "an object and keywords": {"config": PSAConfig(causal=True), **FIELDS},
    "JSON": {"config": PSAConfig.from_json(CONFIG.to_json())},
    "TOML": {"config": PSAConfig.from_toml(CONFIG.to_toml())},
    "numbers of NumPy": {**FIELDS, "block_m": np.int64(64), "block_n": np.int32(32)},
}


def test_equal_configurations_share_one_trace(rng, lengths, once):
    for arguments in WRITTEN.values():
        psa_attention(*inputs(rng, lengths), **arguments)


def test_another_configuration_has_a_trace_of_its_own(rng, lengths, once):
    psa_attention(*inputs(rng, lengths), config=CONFIG)
    with pytest.raises(AssertionError, match="traced"):
        psa_attention(*inputs(rng, lengths), config=OTHER)


def test_gradients_of_equal_configurations_share_one_trace(rng, lengths, once):
    for arguments in list(WRITTEN.values())[:3]:

        def loss(q, k, v, arguments=arguments):
            return psa_attention(q, k, v, **arguments).sum()

        jax.grad(loss, (0, 1, 2))(*inputs(rng, lengths))


def some_levels(rng, length):
    shape = (1, 2, -(-length // 64), -(-length // 32))
    return jnp.asarray(rng.choice([1, 2, 4, 8], shape), jnp.int32)


@pytest.mark.parametrize("call", [psa_attention, sparse_attention])
def test_levels_are_values(call, rng, lengths, once):
    arguments = {"config": CONFIG} if call is psa_attention else {"block_m": 64, "block_n": 32}
    for _ in range(3):
        call(*inputs(rng, lengths), levels=some_levels(rng, lengths), **arguments)
    segments = to_segments(some_levels(rng, lengths))
    with pytest.raises(AssertionError, match="traced"):
        call(*inputs(rng, lengths), levels=segments, **arguments)


def test_a_scale_is_a_value_as_an_array_only(rng, lengths, once):
    for scale in (0.1, 0.2):
        psa_attention(*inputs(rng, lengths), **FIELDS, scale=jnp.float32(scale))
    with pytest.raises(AssertionError, match="traced"):
        psa_attention(*inputs(rng, lengths), **FIELDS, scale=0.1)


def test_inside_jit_a_call_is_traced_with_its_caller(rng, lengths, once):
    @jax.jit
    def attend(q, k, v):
        return psa_attention(q, k, v, config=CONFIG)

    for _ in range(2):
        attend(*inputs(rng, lengths))
