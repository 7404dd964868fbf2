"""The signature of jax.nn.dot_product_attention."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax import dot_product_attention, psa_attention
from shared_specs import PSAConfig

DENSE = PSAConfig(mask_ratios={1: (0.0, 1.0)}, block_m=64, block_n=32)


def make_qkv(rng, length=100, kv_heads=2):
    def array(length, heads):
        return jnp.asarray(rng.standard_normal((1, length, heads, 16)), jnp.float32)

    return array(length, 4), array(100, kv_heads), array(100, kv_heads)


@pytest.mark.parametrize("is_causal", [False, True])
def test_all_level_1_is_that_of_jax(rng, is_causal):
    qkv = make_qkv(rng)
    options = {"scale": 0.3, "is_causal": is_causal}
    found, residual = dot_product_attention(*qkv, **options, config=DENSE, return_residual=True)
    np.testing.assert_allclose(found, jax.nn.dot_product_attention(*qkv, **options), 0, 2e-6)
    keys = jnp.repeat(qkv[1], 2, axis=2)
    logits = 0.3 * jnp.einsum("blhd,bmhd->blhm", qkv[0], keys)
    if is_causal:
        logits = jnp.where(jnp.tri(100)[:, None] > 0, logits, -jnp.inf)
    np.testing.assert_allclose(residual, jax.nn.logsumexp(logits, -1), 0, 2e-6)
    if not is_causal:
        alone = dot_product_attention(*(x[0] for x in qkv), **options, config=DENSE)
        np.testing.assert_allclose(alone, found[0], 0, 1e-6)


def test_arguments_stand_where_jax_has_them():
    ours = inspect.signature(dot_product_attention).parameters.values()
    theirs = inspect.signature(jax.nn.dot_product_attention).parameters.values()
    *ours, config = [(p.name, p.kind) for p in ours]
    assert ours == [(p.name, p.kind) for p in theirs] and config[0] == "config"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bias": jnp.ones(1)}, ValueError, "bias must be None"),
        ({"mask": jnp.ones(1, bool)}, ValueError, "mask must be None: .* causal"),
        ({"query_seq_lengths": jnp.ones(1, int)}, ValueError, "query_seq_lengths must be None"),
        ({"key_value_seq_lengths": [3]}, ValueError, "key_value_seq_lengths must be None"),
        ({"local_window_size": 4}, ValueError, "local_window_size must be None: .* got 4"),
        ({"is_causal": 1}, TypeError, "is_causal must be True or False"),
        ({"implementation": "cudnn"}, ValueError, "implementation must be None or one of"),
        ({"query": "q"}, TypeError, "query must be a jax.Array"),
        ({"key": jnp.ones((100, 2, 16))}, ValueError, r"key must be \[B, L, H, D\]"),
    ],
)
def test_what_would_change_the_result_is_refused(rng, options, error, message):
    given = dict(zip(("query", "key", "value"), make_qkv(rng), strict=True))
    with pytest.raises(error, match=message):
        dot_product_attention(**{**given, **options})


def test_unequal_lengths_are_not_causal_as_in_jax(rng):
    with pytest.raises(ValueError, match="is_causal=True needs as many queries as keys, got 50"):
        dot_product_attention(*make_qkv(rng, 50), is_causal=True)


def test_psa_attention_takes_what_changes_nothing(rng):
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in make_qkv(rng))
    found = psa_attention(q, k, v, bias=None, mask=None, is_causal=False)
    np.testing.assert_array_equal(found, psa_attention(q, k, v))
    with pytest.raises(ValueError, match="the field causal of the configuration"):
        psa_attention(q, k, v, is_causal=True)
    with pytest.raises(ValueError, match="mask must be None: .* levels="):
        psa_attention(q, k, v, mask=jnp.ones(1))
