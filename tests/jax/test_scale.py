"""`scale` as an array has a gradient; other arrays are not taken for numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax import PSAAttention, attention_fn, psa_attention, sparse_attention
from shared_specs import PSAConfig
from tests.jax.attention_contract import QUICK

BLOCKS = {"block_m": 128, "block_n": 64}


def make_qkv(rng, dtype=jnp.float32):
    return [jnp.asarray(rng.normal(size=(1, 2, 128, 16)), dtype) for _ in range(3)]


def given_levels(q, k, v, scale, **blocks):
    levels = jnp.asarray([[1, 2]], jnp.int32)
    levels = jnp.broadcast_to(levels, (*q.shape[:2], 1, 2))
    return sparse_attention(q, k, v, levels, scale=scale, **{**BLOCKS, **blocks})


def chosen_levels(q, k, v, scale, **blocks):
    return psa_attention(q, k, v, scale=scale, **{**BLOCKS, **blocks})


both = pytest.mark.parametrize("attend", [given_levels, chosen_levels])


@both
def test_an_array_is_its_number(rng, attend):
    qkv = make_qkv(rng)
    arrays = jax.jit(attend, compiler_options=QUICK)
    for scale in (jnp.float32(-0.3), np.array([-0.3, 0.5])):
        found = arrays(*qkv, scale)
        for head, factor in enumerate(np.broadcast_to(scale, 2).tolist()):
            number = jax.jit(functools.partial(attend, scale=factor), compiler_options=QUICK)
            np.testing.assert_allclose(found[:, head], number(*qkv)[:, head], 0, 2e-6)
    narrow = [x.astype(jnp.bfloat16) for x in qkv]
    low = arrays(*narrow, scale)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(low, np.float32), found, 0, 0.06)


@both
def test_it_gets_a_gradient(rng, attend):
    with jax.enable_x64(True):
        qkv = make_qkv(rng, jnp.float64)
        weight = jnp.asarray(rng.normal(size=qkv[0].shape))
        scale = jnp.asarray(0.3 if attend is given_levels else [0.2, 0.5])
        loss = jax.jit(
            jax.value_and_grad(lambda scale: (attend(*qkv, scale) * weight).sum()),
            compiler_options=QUICK,
        )
        for place in np.ndindex(scale.shape):
            step = jnp.zeros(scale.shape).at[place].set(1e-6)
            wanted = (loss(scale + step)[0] - loss(scale - step)[0]) / 2e-6
            assert abs(wanted) > 1e-3
            np.testing.assert_allclose(loss(scale)[1][place], wanted, rtol=1e-6)


def test_vmap_over_scales(rng):
    qkv, scales = make_qkv(rng), jnp.asarray([0.1, 0.7])
    attend = functools.partial(given_levels, *qkv)
    for x, scale in zip(jax.vmap(attend)(scales), scales, strict=True):
        np.testing.assert_allclose(x, attend(scale), 0, 2e-6)


@both
def test_what_is_no_scale_is_refused(rng, attend):
    qkv = make_qkv(rng)
    cases = [
        (jnp.ones(3), ValueError, r"scale must be .* \[H\] = \(2,\), got shape \(3,\)"),
        (jnp.ones((1, 2)), ValueError, r"scale must be .* got shape \(1, 2\)"),
        (jnp.int32(1), TypeError, "scale must be a number or a floating array, got int32"),
        (jnp.float32(jnp.inf), ValueError, "scale must be finite in float32"),
        (np.array([1, 3.5e38]), ValueError, r"scale must be finite in float32, .*got 3.5e"),
        (3.5e38, ValueError, "scale must be finite in float32"),
        ("0.5", TypeError, "scale must be"),
    ]
    for scale, error, message in cases:
        with pytest.raises(error, match=message):
            attend(*qkv, scale)
    with pytest.raises(TypeError, match="scale must be a number or a floating array, got int32"):
        jax.jit(attend)(*qkv, 1)


@both
def test_numpy_scalars_are_numbers(rng, attend):
    qkv = make_qkv(rng)
    blocks = {name: np.int64(size) for name, size in BLOCKS.items()}
    wanted = attend(*qkv, 0.25)
    for number in (np.float32, np.float64, np.float16):
        np.testing.assert_array_equal(attend(*qkv, number(0.25), **blocks), wanted)


@pytest.mark.parametrize("name", ["sim_2x_threshold", "min_full_ratio", "budget", "scale"])
def test_arrays_are_no_fields_of_a_configuration(name):
    def make(value):
        return PSAConfig(**{name: value})

    for call in (make, jax.jit(make), jax.grad(make)):
        with pytest.raises(TypeError, match=f"{name} must be a number, not an array"):
            call(jnp.float32(0.5))
    with pytest.raises(TypeError, match="scale must be a number, not an array"):
        attention_fn(scale=jnp.float32(0.5))
    with pytest.raises(TypeError, match="scale must be a number, not an array"):
        PSAAttention(PSAConfig(scale=jnp.float32(0.5)))


@pytest.mark.parametrize("name", ["block_m", "sink_blocks", "sample_m"])
def test_nor_are_they_integers(rng, name):
    for call in (lambda n: PSAConfig(**{name: n}), jax.jit(lambda n: PSAConfig(**{name: n}))):
        with pytest.raises(TypeError, match=f"{name} must be an integer, not an array"):
            call(jnp.int32(64))
    with pytest.raises(ValueError, match=r"block_m must be one of \(64, 128\), got Array"):
        given_levels(*make_qkv(rng), 0.5, block_m=jnp.int32(64))
