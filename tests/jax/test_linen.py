"""The Flax module, and the function for Flax's own attention layer."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from psa_jax import PSAAttention, PSAConfig, attention_fn, psa_attention

SMALL = PSAConfig(block_m=64, block_n=32)


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def test_module_is_the_function(rng):
    q, k, v = (normal(rng, 1, 2, 200, 16) for _ in range(3))
    module = PSAAttention(SMALL)
    assert module.init(jax.random.key(0), q, k, v) == {}
    options = {"return_lse": True, "return_levels": True}
    got = jax.jit(lambda *x: module.apply({}, *x, **options))(q, k, v)
    want = jax.jit(lambda *x: psa_attention(*x, config=SMALL, **options))(q, k, v)
    chex.assert_trees_all_equal(got, want)
    given = module.apply({}, q, k, v, levels=got[2], implementation="gather")
    np.testing.assert_allclose(given, got[0], rtol=0, atol=1e-6)
    assert hash(module) == hash(PSAAttention(SMALL)) and PSAAttention().config is None
    with pytest.raises(TypeError, match="config must be a PSAConfig or None, got str"):
        PSAAttention("small").apply({}, q, k, v)


class Block(nn.Module):
    """One layer of a small causal transformer."""

    @nn.compact
    def __call__(self, x):
        heads, width = 2, x.shape[-1]
        normed = nn.LayerNorm()(x)
        q, k, v = (
            nn.DenseGeneral((heads, width // heads), name=name)(normed).swapaxes(1, 2)
            for name in "qkv"
        )
        out = PSAAttention(PSAConfig(causal=True, block_m=64, block_n=32))(q, k, v)
        x = x + nn.DenseGeneral(width, axis=(-2, -1))(out.swapaxes(1, 2))
        return x + nn.Dense(width)(nn.gelu(nn.Dense(2 * width)(nn.LayerNorm()(x))))


class Model(nn.Module):
    """Predicts the next of a few symbols."""

    symbols: int = 5

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(self.symbols, 32)(tokens)
        x = nn.remat(Block)()(x)
        return nn.Dense(self.symbols)(x)


def test_training_lowers_the_loss(rng):
    # The next symbol is a fixed function of the one five places back: attention has to find it.
    tokens = rng.integers(0, 5, (4, 160))
    for place in range(5, 160):
        tokens[:, place] = (tokens[:, place - 5] * 2 + 1) % 5
    tokens = jnp.asarray(tokens)
    model = Model()
    params = model.init(jax.random.key(1), tokens)

    def loss(params):
        logits = model.apply(params, tokens[:, :-1])
        chosen = jnp.take_along_axis(nn.log_softmax(logits), tokens[:, 1:, None], -1)
        return -chosen.mean()

    optimiser = optax.adam(3e-3)
    state = optimiser.init(params)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimiser.update(grads, state)
        return value, optax.apply_updates(params, updates), state

    losses = []
    for _ in range(40):
        value, params, state = step(params, state)
        losses.append(float(value))
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.75 * losses[0], losses


def test_flax_attention_layer(rng):
    """With every block at level 1 the layer gives what Flax's own attention gives."""
    x = normal(rng, 3, 130, 32)
    options = {"num_heads": 2, "qkv_features": 32}
    plain = nn.MultiHeadDotProductAttention(**options)
    params = plain.init(jax.random.key(0), x)
    everything = PSAConfig(mask_ratios={1: (0, 1)}, block_m=64, block_n=32)
    ours = nn.MultiHeadDotProductAttention(**options, attention_fn=attention_fn(everything))
    np.testing.assert_allclose(ours.apply(params, x), plain.apply(params, x), rtol=0, atol=2e-6)
    causal = attention_fn(everything, causal=True)
    ours = nn.MultiHeadDotProductAttention(**options, attention_fn=causal)
    masked = plain.apply(params, x, mask=nn.make_causal_mask(x[..., 0]))
    np.testing.assert_allclose(ours.apply(params, x), masked, rtol=0, atol=2e-6)


def test_flax_attention_layer_in_low_precision_and_more_batch_axes(rng):
    x = normal(rng, 2, 3, 130, 32)
    layer = nn.MultiHeadDotProductAttention(
        num_heads=2, dtype=jnp.bfloat16, attention_fn=attention_fn(SMALL), dropout_rate=0.5
    )
    params = layer.init(jax.random.key(0), x, deterministic=True)
    out = layer.apply(params, x, deterministic=True)
    assert out.shape == x.shape and out.dtype == jnp.bfloat16


def test_flax_attention_refuses_what_it_cannot_honour(rng):
    x = normal(rng, 1, 64, 16)
    layer = nn.MultiHeadDotProductAttention(
        num_heads=2, attention_fn=attention_fn(SMALL), dropout_rate=0.5
    )
    params = layer.init(jax.random.key(0), x, deterministic=True)
    with pytest.raises(ValueError, match=r"mask must be None.*PSAConfig\(causal=True\)"):
        layer.apply(params, x, mask=nn.make_causal_mask(x[..., 0]), deterministic=True)
    with pytest.raises(ValueError, match="dropout_rate must be 0 or deterministic True, .*0.5"):
        layer.apply(params, x, deterministic=False, rngs={"dropout": jax.random.key(1)})
    with pytest.raises(ValueError, match="sow_weights must be False"):
        layer.apply(params, x, deterministic=True, sow_weights=True, mutable=["intermediates"])
    q = normal(rng, 1, 64, 2, 8)
    with pytest.raises(ValueError, match="bias must be None"):
        attention_fn(SMALL)(q, q, q, bias=jnp.zeros((1, 2, 64, 64)))
    with pytest.raises(ValueError, match="qk_attn_weights_einsum must be None"):
        attention_fn(SMALL)(q, q, q, qk_attn_weights_einsum=jnp.einsum)
    with pytest.raises(ValueError, match=r"query must be \[..., L, H, D\], got shape \(64, 8\)"):
        attention_fn(SMALL)(q[0, :, 0], q, q)
    with pytest.raises(ValueError, match="block_m must be one of"):
        attention_fn(block_m=7)
