"""Flax NNX: `attention_fn` in its attention layer, and modules equal to those of linen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import psa_jax
from psa_jax import PSAConfig, attention_fn, psa_attention
from psa_jax.nnx import PSAAttention, PSAState, PSAVideoAttention, density_records

EVERYTHING = PSAConfig(mask_ratios={1: (0, 1)}, block_m=64, block_n=32)


def layer(seed=0, **options):
    return nnx.MultiHeadAttention(
        num_heads=2, in_features=32, decode=False, rngs=nnx.Rngs(seed), **options
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


def test_grouped_heads_inside_jit_and_scan(rng):
    """Three layers, one after the other and scanned."""
    x = jnp.asarray(rng.standard_normal((2, 70, 32)), jnp.float32)
    grouped = {"num_kv_heads": 1, "attention_fn": attention_fn(EVERYTHING)}
    plain = layer(num_kv_heads=1)(x, is_causal=True)
    ours = nnx.jit(lambda layer, x: layer(x, is_causal=True))(layer(**grouped), x)
    np.testing.assert_allclose(ours, plain, rtol=0, atol=2e-6)

    @nnx.vmap(in_axes=0)
    def make(key):
        return layer(key, **grouped)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def through(x, layer):
        return x + layer(x, is_causal=True)

    stacked = make(jax.random.split(jax.random.key(1), 3))
    found = nnx.jit(through)(x, stacked)
    graph, state = nnx.split(stacked)
    for i in range(3):
        one = nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], state))
        x = x + one(x, is_causal=True)
    np.testing.assert_allclose(found, x, rtol=0, atol=1e-5)


def make_qkv(rng, length=128):
    return [jnp.asarray(rng.standard_normal((1, 1, length, 8)), jnp.float32) for _ in range(3)]


def test_the_module_is_the_function(rng):
    qkv, config = make_qkv(rng, 64), PSAConfig(block_m=64, block_n=32)
    module = PSAAttention(config)
    assert not jax.tree.leaves(nnx.state(module))
    found = nnx.jit(lambda module, *x: module(*x, return_lse=True))(module, *qkv)
    for x, y in zip(found, psa_attention(*qkv, config=config, return_lse=True), strict=True):
        np.testing.assert_array_equal(x, y)
    with pytest.raises(TypeError, match="config must be a PSAConfig or None, got str"):
        PSAAttention("small")
    with pytest.raises(TypeError, match="warmup_steps must be an integer"):
        PSAVideoAttention(warmup_steps=1.0)


VIDEO = PSAConfig(rearrange_method="SemanticAware", grid=(2, 8, 8))


@pytest.mark.parametrize(
    "options", [{}, {"refresh_every": 2, "schedule": {3: {1: (0.0, 0.5)}}}], ids=["anew", "kept"]
)
def test_the_video_module_is_that_of_linen(rng, options):
    ours = PSAVideoAttention(VIDEO, record_steps=4, **options)
    theirs, state = psa_jax.PSAVideoAttention(VIDEO, record_steps=4, **options), {}

    @functools.partial(nnx.jit, static_argnames="branch")
    def call(module, step, *qkv, branch):
        return module(*qkv, step=step, branch=branch)

    @functools.partial(jax.jit, static_argnames="branch")
    def apply(state, step, *qkv, branch):
        return theirs.apply(state, *qkv, step=step, branch=branch, mutable=["psa"])

    for step in (1, 2, 0, 3):
        for branch in ("", "negative"):
            qkv = make_qkv(rng)
            out = call(ours, step, *qkv, branch=branch)
            want, state = apply(state, step, *qkv, branch=branch)
            np.testing.assert_array_equal(out, want)
    for branch, suffix in (("", ""), ("negative", "[negative]")):
        for name, variable in ours.memory[branch].items():
            assert isinstance(variable, PSAState)
            np.testing.assert_array_equal(variable[...], state["psa"][name + suffix])

    def without_layer(records):
        return [(r.step, r.head, r.density) for r in records]

    records = density_records(ours)
    assert without_layer(records) == without_layer(psa_jax.density_records(state))
    assert len(records) == 4 * 2
    ours.reset()
    assert not len(density_records(ours)) and not jax.tree.leaves(nnx.state(ours))


def test_a_warm_up_step_is_dense_and_opens_a_run_for_every_branch(rng):
    qkv = make_qkv(rng)
    module = PSAVideoAttention(VIDEO, warmup_steps=1, record_steps=2)
    module.prepare(*qkv, "", "negative")
    for memory in module.memory.values():
        memory["centroids_step"][...] = jnp.int32(5)
    out = module(*qkv, step=0)
    np.testing.assert_array_equal(out, psa_jax.PSAVideoAttention(
        VIDEO, warmup_steps=1).apply({}, *qkv, step=0))  # fmt: skip
    assert [int(memory["centroids_step"][...]) for memory in module.memory.values()] == [-1, -1]
    assert [r.density for r in density_records(module)] == [1.0]


class Layer(nnx.Module):
    def __init__(self, seed):
        self.weights = nnx.Param(jax.random.normal(jax.random.key(seed), (3, 8, 8)) * 0.5)
        self.attention = PSAVideoAttention(VIDEO, record_steps=4)

    def __call__(self, x, step):
        q, k, v = (x @ w for w in self.weights[...])
        return x + self.attention(q, k, v, step=step)


def test_a_checkpoint_and_a_scan_over_layers_change_nothing(rng):
    x = make_qkv(rng)[0]

    def apart(remat):
        layers = [Layer(seed) for seed in range(2)]

        def loss(layers, x, step):
            def call(layer, x):
                return layer(x, step)

            for layer in layers:
                x = (nnx.remat(call) if remat else call)(layer, x)
            return (x**2).sum()

        layers = nnx.List(layers)
        for layer in layers:
            layer.attention.prepare(x, x, x)
        grads = nnx.jit(nnx.grad(loss), static_argnums=2)(layers, x, 1)
        return jax.tree.leaves(grads), density_records(layers)

    (plain, records), (found, again) = apart(False), apart(True)
    for a, b in zip(found, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))
    assert again == records and [r.layer for r in records] == ["0.attention", "1.attention"]

    @nnx.vmap(in_axes=0)
    def make(seed):
        layer = Layer(seed)
        layer.attention.prepare(x, x, x)
        return layer

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def through(x, layer):
        return layer(x, 1)

    stacked = make(jnp.arange(2))
    nnx.jit(through)(x, stacked)
    scanned = density_records(stacked)
    assert [r.layer for r in scanned] == ["attention.0", "attention.1"]
    assert [r.density for r in scanned] == pytest.approx([r.density for r in records])
