"""`rest="mean"`: blocks of level 0 are seen through their means."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax import psa_attention, sparse_attention
from psa_jax.attention import rest
from shared_specs import PSAConfig
from tests.jax.attention_contract import (
    QUICK,
    Case,
    assert_close,
    expected,
    plain_attention,
    relative_errors,
    run,
)

TOLERANCE = 2e-6
MEAN = {"rest": "mean"}
CASES = [
    Case(),
    Case(level=0, q_len=130, kv_len=1, head_dim=24),
    Case(level="empty", q_len=77, kv_len=300, heads=4, kv_heads=2, is_causal=True, block_n=32),
    Case(level=0, q_len=300, kv_len=77, is_causal=True, batch=1),
    Case(block_m=128, block_n=128, q_len=333, kv_len=257, heads=3, kv_heads=1, scale=-1.5),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_oracle(case, rng):
    inputs = case.inputs(rng)
    got = run(inputs, "gather", **case.settings(), **MEAN)
    assert_close(got, expected(inputs, **case.settings(), **MEAN), TOLERANCE)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_low_precision_is_within_twice_the_plain_error(dtype, rng):
    case = Case(dtype=dtype, q_len=256, kv_len=256)
    inputs = case.inputs(rng)
    errors = relative_errors(
        run(inputs, "gather", **case.settings(), **MEAN),
        expected(inputs, **case.settings(), **MEAN),
    )
    whole = inputs._replace(levels=jnp.where(inputs.levels == 0, 8, inputs.levels))
    yardstick = relative_errors(
        plain_attention(whole, **case.settings()), expected(whole, **case.settings())
    )
    assert all(errors[name] <= 2 * yardstick[name] for name in errors), (errors, yardstick)


def test_chunks_of_rows_do_not_show(rng, monkeypatch):
    case = Case(q_len=333, heads=4, kv_heads=2, is_causal=True)
    inputs = case.inputs(rng)
    want = run(inputs, "gather", **case.settings(), **MEAN)
    monkeypatch.setattr(rest, "_ELEMENTS", 1)
    jax.clear_caches()
    assert_close(run(inputs, "gather", **case.settings(), **MEAN), want, 1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {"causal": True},
        {"mask_mode": "budget", "importance": "defect", "budget": 0.1},
        {"rearrange_method": "Gilbert", "grid": (3, 10, 10)},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_whole_call(fields, rng):
    """Closer to dense than without, for the same levels; the levels may be given as well."""
    config = PSAConfig(block_m=64, block_n=32, rest="mean", **fields)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 2, 300, 16)), jnp.float32) for _ in range(3))
    out, levels = psa_attention(q, k, v, config=config, return_levels=True)
    again = psa_attention(q, k, v, config=config, levels=levels)
    np.testing.assert_allclose(out, again, atol=2e-6)
    skipped = psa_attention(q, k, v, config=config, rest="skip", levels=levels)
    dense = jax.nn.dot_product_attention(
        *(x.swapaxes(1, 2) for x in (q, k, v)), is_causal=config.causal
    ).swapaxes(1, 2)
    assert jnp.linalg.norm(out - dense) < jnp.linalg.norm(skipped - dense)


def test_vmap_and_gradients(rng):
    config = PSAConfig(block_m=64, block_n=32, rest="mean")
    x = [jnp.asarray(rng.normal(size=(3, 1, 2, 100, 16)), jnp.float32) for _ in "qkv"]

    def loss(q, k, v):
        return (psa_attention(q, k, v, config=config) ** 2).sum()

    gradients = jax.grad(loss, (0, 1, 2))
    got = jax.jit(jax.vmap(gradients), compiler_options=QUICK)(*x)
    one = jax.jit(gradients, compiler_options=QUICK)
    for index in range(3):
        want = one(*(y[index] for y in x))
        chex.assert_trees_all_close([x[index] for x in got], list(want), rtol=1e-7, atol=1e-5)


@pytest.mark.parametrize("value", ["sum", None, 1])
def test_refused(value, rng):
    q = jnp.asarray(rng.normal(size=(1, 1, 64, 16)), jnp.float32)
    with pytest.raises(ValueError, match="rest must be"):
        psa_attention(q, q, q, rest=value)
    levels = jnp.ones((1, 1, 1, 1), jnp.int32)
    with pytest.raises(ValueError, match="rest must be"):
        sparse_attention(q, q, q, levels, block_m=64, block_n=64, rest=value)
