"""`attention_fn` in the attention layer of Flax NNX."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from psa_jax import PSAConfig, attention_fn

EVERYTHING = PSAConfig(mask_ratios={1: (0, 1)}, block_m=64, block_n=32)


def layer(**options):
    return nnx.MultiHeadAttention(
        num_heads=2, in_features=32, decode=False, rngs=nnx.Rngs(0), **options
    )


@pytest.mark.parametrize("is_causal", [False, True])
def test_level_1_is_the_layers_own_attention(rng, is_causal):
    x = jnp.asarray(rng.standard_normal((2, 130, 32)), jnp.float32)
    want = layer()(x, is_causal=is_causal)
    ours = layer(attention_fn=attention_fn(EVERYTHING))
    np.testing.assert_allclose(ours(x, is_causal=is_causal), want, rtol=0, atol=2e-6)
    assert np.abs(want - layer()(x, is_causal=not is_causal)).max() > 1e-3


def test_a_causal_call_is_refused_where_it_means_something_else(rng):
    x = jnp.asarray(rng.standard_normal((1, 64, 2, 16)), jnp.float32)
    ordered = attention_fn(PSAConfig(rearrange_method="Gilbert", grid=(4, 4, 4)))
    with pytest.raises(ValueError, match="causal=True with rearrange_method='Gilbert'"):
        ordered(x, x, x, is_causal=True)
    with pytest.raises(ValueError, match="is_causal=True needs as many keys as queries, got 32"):
        attention_fn(EVERYTHING)(x[:, :32], x, x, is_causal=True)
    with pytest.raises(TypeError, match="is_causal must be True or False, got 1"):
        attention_fn(EVERYTHING)(x, x, x, is_causal=1)
