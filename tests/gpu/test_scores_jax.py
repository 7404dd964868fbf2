"""The JAX scores kernel on a Hopper GPU, against the float64 rules."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax import importance
from psa_jax.kernels import scores
from psa_jax.kernels.scores.tiles import default_config
from psa_jax.selection import select_levels
from shared_specs import PSAConfig
from shared_specs import importance as np_importance
from shared_specs import selection as np_selection

pytestmark = pytest.mark.gpu

CASES = {
    "default": (PSAConfig(), {}),
    "causal": (PSAConfig(causal=True), {"kv_len": 5001}),
    "causal, more queries": (PSAConfig(causal=True, block_m=64), {"kv_len": 3001}),
    "pool 8, D 64": (PSAConfig(importance_pool=8, block_n=128), {"head_dim": 64}),
    "pool 2, float16": (
        PSAConfig(importance_pool=2, block_n=32, tile_n=8),
        {"dtype": jnp.float16, "q_len": 2050, "kv_len": 2050},
    ),
    "sampled": (PSAConfig(importance="sampled", sample_m=7, sample_n=5), {}),
    "sampled causal, D 64": (
        PSAConfig(importance="sampled", causal=True, scale=-0.2),
        {"head_dim": 64},
    ),
    "two in a batch": (PSAConfig(importance_pool=8), {"batch": 2}),
}


def draw(batch=1, heads=4, kv_heads=2, q_len=4163, kv_len=4163, head_dim=128, dtype=jnp.bfloat16):
    a, b = jax.random.split(jax.random.key(0))
    q = jax.random.normal(a, (batch, heads, q_len, head_dim), dtype)
    return q, jax.random.normal(b, (batch, kv_heads, kv_len, head_dim), dtype)


@pytest.mark.parametrize("name", CASES)
def test_scores_and_the_levels_they_choose(name):
    config, shape = CASES[name]
    q, k = draw(**shape)
    assert scores.unsupported(q, k, config) is None
    run = jax.jit(lambda q, k: importance.block_scores(q, k, config))
    got = np.asarray(run(q, k))
    want = np_importance.block_scores(*(np.asarray(x, np.float32) for x in (q, k)), config)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-3)
    np.testing.assert_array_equal(got == 0, want == 0)
    np.testing.assert_array_equal(run(q, k), got)

    lengths = {"q_len": q.shape[2], "kv_len": k.shape[2]}
    chosen = jax.jit(lambda s: select_levels(s, config, **lengths))(got)
    right = np_selection.select_levels(want, config, **lengths)
    assert (np.asarray(chosen) == right).mean() >= 0.998


def test_heads_in_several_launches_are_the_same_as_in_one():
    q, k = draw()
    config = PSAConfig(causal=True)
    want = jax.jit(lambda q, k: importance.block_scores(q, k, config))(q, k)
    small = dataclasses.replace(default_config(128, 66, True), most_bytes=1)
    got = scores.peak_scores(q, k, config=config, sizes=small)
    np.testing.assert_array_equal(got, want)


def test_the_program_never_calls_the_host():
    run = jax.jit(lambda q, k: importance.block_scores(q, k, PSAConfig()))
    text = run.lower(*draw()).compile().as_text()
    assert "mosaic_gpu" in text
    assert "callback" not in text and "outfeed" not in text and "send-to-host" not in text
