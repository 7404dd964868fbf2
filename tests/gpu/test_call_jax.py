"""The whole JAX call on a Hopper GPU: repeatability and no transfer between q, k, v and out."""

import jax
import jax.numpy as jnp
import pytest

from psa_jax import psa_attention
from shared_specs import PSAConfig

pytestmark = pytest.mark.gpu

CONFIGS = {
    "default": PSAConfig(),
    "causal": PSAConfig(causal=True, block_n=32, sink_blocks=1),
    "thresholdbound": PSAConfig(mask_mode="thresholdbound", block_n=128),
}


def draw(heads=4, kv_heads=2, length=2050, head_dim=64):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(1, h, length, head_dim) for h in (heads, kv_heads, kv_heads)]
    return [jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes, strict=True)]


def whole(config):
    def loss(q, k, v):
        out = psa_attention(q, k, v, config=config, implementation="mosaic")
        return out.astype(jnp.float32).var(), out

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_repeats_bit_for_bit_without_transfers(name):
    inputs, run = draw(), whole(CONFIGS[name])
    first = jax.block_until_ready(run(*inputs))
    with jax.transfer_guard("disallow"):
        again = jax.block_until_ready(run(*inputs))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        assert bool((a == b).all()) and bool(jnp.isfinite(a).all())


def test_the_program_never_calls_the_host():
    text = whole(PSAConfig()).lower(*draw()).compile().as_text()
    assert "callback" not in text and "outfeed" not in text and "send-to-host" not in text
