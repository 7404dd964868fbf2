"""PSAVideoAttention in Flax: warm-up, warm start, records, cross-attention, presets, under jit."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax import psa_attention
from psa_jax.order import TokenOrder
from psa_jax.video import PSAVideoAttention, density_records
from shared_specs import PSAConfig, presets
from tests.video_reference import reference

GRID, TEXT = (4, 8, 16), 20
LENGTH = 4 * 8 * 16 + TEXT


def make_qkv(rng, length=LENGTH, kv_length=None, heads=2, kv_heads=1, dim=16):
    def array(count, tokens):
        return jnp.asarray(rng.normal(size=(1, count, tokens, dim)), jnp.float32)

    kv_length = kv_length or length
    return array(heads, length), array(kv_heads, kv_length), array(kv_heads, kv_length)


def config_of(method, **fields):
    return PSAConfig(rearrange_method=method, grid=GRID, text_length=TEXT, **fields)


def dense(q, k, v, scale=None, visible=None):
    k, v = (jnp.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    logits = jnp.einsum("bhqd,bhkd->bhqk", q, k) * (scale or q.shape[-1] ** -0.5)
    if visible is not None:
        logits = jnp.where(visible, logits, -jnp.inf)
    return jnp.einsum("bhqk,bhkd->bhqd", jax.nn.softmax(logits), v)


def close(a, b, atol=2e-5):
    np.testing.assert_allclose(a, b, atol=atol, rtol=0)


def call(module, *qkv, **options):
    """One compiled call without state."""
    return jax.jit(lambda *qkv: module.apply({}, *qkv, **options))(*qkv)


@pytest.mark.parametrize("method", [None, "STA", "Clusters", "SemanticAware", "Hybrid"])
def test_a_sparse_step_is_psa_attention(rng, method):
    config = config_of(method)
    qkv = make_qkv(rng)
    out, lse = call(PSAVideoAttention(config, warmup_steps=2), *qkv, step=2, return_lse=True)
    expected, expected_lse, _ = reference(*qkv, config)
    close(out, expected)
    close(lse, expected_lse)
    assert np.abs(out - dense(*qkv)).max() > 1e-3


def test_warm_up_steps_are_dense(rng):
    qkv = make_qkv(rng)
    config = config_of("Gilbert", scale=0.3)
    module = PSAVideoAttention(config, warmup_steps=2)
    close(call(module, *qkv, step=1), dense(*qkv, scale=0.3))

    # A traced step chooses at run time: one compiled program for all steps.
    run = jax.jit(lambda step: module.apply({}, *qkv, step=step))
    for step in range(2):
        close(run(step), dense(*qkv, scale=0.3))
    sparse = reference(*qkv, config)[0]
    close(run(2), sparse)
    assert run._cache_size() == 1 and np.abs(sparse - dense(*qkv, scale=0.3)).max() > 1e-3


def test_a_missing_or_bad_step_is_refused(rng):
    qkv = make_qkv(rng)
    module = PSAVideoAttention(config_of(None), warmup_steps=1)
    with pytest.raises(ValueError, match="step must be given with warmup_steps=1"):
        module.apply({}, *qkv)
    for step in (True, 1.0, jnp.float32(1), jnp.arange(2)):
        with pytest.raises(TypeError, match="step must be a"):
            module.apply({}, *qkv, step=step)
    with pytest.raises(ValueError, match="step must be at least 0, got -1"):
        module.apply({}, *qkv, step=-1)
    with pytest.raises(ValueError, match="warmup_steps must be at least 0"):
        PSAVideoAttention(warmup_steps=-1).apply({}, *qkv)
    with pytest.raises(TypeError, match="config must be a PSAConfig"):
        PSAVideoAttention({"block_m": 128}).apply({}, *qkv)


def test_cross_attention_is_dense_and_leaves_no_trace(rng):
    module = PSAVideoAttention(config_of("Gilbert"), warmup_steps=1, record_steps=4)
    other = make_qkv(rng, kv_length=77)
    out, state = call(module, *other, step=2, mutable=["psa"])
    close(out, dense(*other))
    assert not state
    same_length = make_qkv(rng)
    close(call(module, *same_length, cross_attention=True), dense(*same_length))


def test_causal_calls_with_a_longer_past_are_sparse(rng):
    config = PSAConfig(causal=True)
    qkv = make_qkv(rng, length=300, kv_length=700)
    module = PSAVideoAttention(config, warmup_steps=1)
    sparse = call(module, *qkv, step=1)
    close(sparse, reference(*qkv, config)[0])
    visible = np.arange(700)[None] <= np.arange(300)[:, None] + 400
    close(call(module, *qkv, step=0), dense(*qkv, visible=visible))
    assert np.abs(sparse - dense(*qkv, visible=visible)).max() > 1e-3


def test_bad_lengths_and_arrays_are_refused(rng):
    module = PSAVideoAttention(config_of("Gilbert"))
    with pytest.raises(ValueError, match="length 500 is not grid .* text"):
        module.apply({}, *make_qkv(rng, length=500), step=0)
    q, k, v = make_qkv(rng, heads=4, kv_heads=2)
    with pytest.raises(TypeError, match="q must be a jax.Array"):
        module.apply({}, q.tolist(), k, v, step=0)
    with pytest.raises(ValueError, match="heads of q must be a multiple"):
        module.apply({}, q[:, :3], k, v, step=0)
    with pytest.raises(ValueError, match="implementation must be None or one of"):
        module.apply({}, q, k, v, step=0, implementation="flash")


def test_centroids_pass_from_step_to_step(rng):
    config = config_of("SemanticAware")
    qkv = make_qkv(rng)
    module = PSAVideoAttention(config, warmup_steps=1)

    advance = jax.jit(lambda *now: module.apply(now[0], *qkv, step=now[1], mutable=["psa"])[1])
    order = TokenOrder.from_config(config, LENGTH, LENGTH)
    cold = order.apply(*qkv)[3].centroids
    warm = order.apply(*qkv, centroids=cold)[3].centroids
    assert np.abs(warm.keys - cold.keys).max() > 1e-3

    state = advance({}, 1)
    close(state["psa"]["key_centroids"], cold.keys, 1e-5)
    close(state["psa"]["query_centroids"], cold.queries, 1e-5)
    assert int(state["psa"]["centroids_step"]) == 1
    state = advance(state, 2)
    close(state["psa"]["key_centroids"], warm.keys, 1e-5)
    again = advance(state, 1)  # an earlier step is another run
    close(again["psa"]["key_centroids"], cold.keys, 1e-5)
    after_warm_up = advance(advance(state, 0), 3)  # so is what follows a warm-up step
    close(after_warm_up["psa"]["key_centroids"], cold.keys, 1e-5)


def test_centroids_of_another_shape_are_refused(rng):
    module = PSAVideoAttention(config_of("SemanticAware"))
    init = jax.eval_shape(lambda *qkv: module.init(jax.random.key(0), *qkv, step=0), *make_qkv(rng))
    with pytest.raises(ValueError, match="centroids of an earlier call must have shape"):
        jax.eval_shape(
            lambda state, *qkv: module.apply(state, *qkv, step=1), init, *make_qkv(rng, heads=4)
        )


def test_state_is_read_without_being_written(rng):
    config = config_of("Hybrid")
    qkv = make_qkv(rng)
    module = PSAVideoAttention(config, record_steps=2)
    run = jax.jit(lambda state, step: module.apply(state, *qkv, step=step, mutable=["psa"]))
    state = run({}, 0)[1]
    assert set(state["psa"]) == {
        *("centroids_step", "start_is_warm", "key_start", "key_centroids", "density")
    }
    written = run(state, 1)[0]
    read = jax.jit(lambda state: module.apply(state, *qkv, step=1))(state)
    close(read, written, 1e-6)


def test_init_makes_the_state_without_a_step_in_it(rng):
    qkv = make_qkv(rng)
    module = PSAVideoAttention(config_of("SemanticAware"), record_steps=3)
    variables = jax.jit(lambda: module.init(jax.random.key(0), *qkv, step=2))()
    assert set(variables) == {"psa"} and int(variables["psa"]["centroids_step"]) == -1
    assert len(density_records(variables)) == 0


class Model(nn.Module):
    """Two attention layers, as a video model would have them."""

    config: PSAConfig

    @nn.compact
    def __call__(self, q, k, v, step):
        for index in range(2):
            name = f"block_{index}"
            layer = PSAVideoAttention(self.config, warmup_steps=1, record_steps=4, name=name)
            q = q + layer(q, k, v, step=step)
        return q


def test_records_hold_every_layer_step_and_head(rng):
    ratios = {1: (0.0, 0.4), 2: (0.4, 0.6), 4: (0.6, 0.7), 8: (0.7, 0.9), 0: (0.9, 1.0)}
    config = PSAConfig(
        rearrange_method="Gilbert", grid=(4, 8, 24), mask_mode="thresholdbound", mask_ratios=ratios
    )
    model, state, expected = Model(config), {}, {}
    advance = jax.jit(lambda state, step, *x: model.apply(state, *x, step, mutable=["psa"]))
    for step in range(3):
        q, k, v = make_qkv(rng, length=768)
        q = q * jnp.array([1.0, 32])[:, None, None]
        _, state = advance(state, step, q, k, v)
        densities = [1.0, 1.0] if step == 0 else reference(q, k, v, config)[2]
        expected.update({("block_0", step, head): densities[head] for head in range(2)})
    records = density_records(state)
    assert len(records) == 2 * 3 * 2
    found = {(r.layer, r.step, r.head): r.density for r in records}
    assert {layer for layer, *_ in found} == {"block_0", "block_1"}
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=1e-6)
    assert len({round(value, 6) for value in found.values()}) > 3
    assert [r.step for r in records] == sorted(r.step for r in records)


def test_records_name_stacked_layers_in_their_order():
    density = np.full((11, 2, 1), -1.0, np.float32)
    density[:, 1] = 0.5
    plain = {"density": np.array([[1.0], [0.25]], np.float32)}
    variables = {"psa": {"top": plain, "blocks": {"attention": {"density": density}}}}
    layers, steps, means = density_records(variables).by_layer_and_step()
    assert steps == [0, 1] and layers[0] == "top"
    assert layers[1:] == [f"blocks.attention.{index}" for index in range(11)]
    assert means[0] == [1.0, 0.25] and means[1][1] == 0.5 and np.isnan(means[1][0])


def test_gradients_are_those_of_psa_attention(rng):
    config = config_of("Hybrid")
    qkv = make_qkv(rng)
    weight = jnp.asarray(rng.normal(size=qkv[0].shape), jnp.float32)
    module = PSAVideoAttention(config, warmup_steps=1)

    def gradients(function):
        def loss(qkv, *arguments):
            return (function(*qkv, *arguments) * weight).sum()

        return jax.jit(jax.grad(loss))

    ours = gradients(lambda q, k, v, s: module.apply({}, q, k, v, step=s, mutable=["psa"])[0])
    for step, function in ((0, dense), (1, lambda *qkv: psa_attention(*qkv, config=config))):
        for a, b in zip(ours(qkv, step), gradients(function)(qkv), strict=True):
            close(a, b, 1e-4)


@pytest.mark.parametrize("name", presets.names())
def test_presets_run_end_to_end(rng, name):
    preset = presets.load(name)
    divisors = preset.divisors
    if divisors is None:
        size, length = None, 700
    else:
        size = (10 * divisors.width - 3, 8 * divisors.height, 5 * divisors.frames - 1)
        length = 10 * 8 * 5 + preset.config.text_length
    module = PSAVideoAttention.from_preset(name, size, record_steps=20, name="attention")
    assert module.config == PSAConfig.preset(name, size)
    assert module.warmup_steps == preset.warmup_steps
    q, k, v = make_qkv(rng, length=length)
    q = 3 * q
    out, state = call(module, q, k, v, step=preset.warmup_steps, mutable=["psa"])
    expected, _, densities = reference(q, k, v, module.config)
    close(out, expected)
    records = density_records(state)
    assert [record.density for record in records] == pytest.approx(densities, abs=1e-6)
    assert [record.step for record in records] == [preset.warmup_steps] * 2
