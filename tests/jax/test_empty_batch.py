"""A batch of nothing gives nothing, as JAX's own attention does."""

import jax
import jax.numpy as jnp
import pytest

from psa_jax import PSAVideoAttention, psa_attention, sparse_attention
from shared_specs import PSAConfig

CONFIGS = [
    PSAConfig(),
    PSAConfig(importance="antidiagonal", causal=True),
    PSAConfig(block_n=128, attn_impl="old_mask_type", use_sim_mask=True),
    PSAConfig(importance="defect", mask_mode="budget", rest="mean"),
    PSAConfig(rearrange_method="Gilbert", grid=(2, 8, 10)),
    PSAConfig(rearrange_method="SemanticAware", grid=(2, 8, 10)),
]


def empty():
    return [jnp.zeros((0, heads, 160, 16)) for heads in (4, 2, 2)]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_chosen_levels(config):
    qkv = empty()

    def attend(*qkv):
        return psa_attention(*qkv, config=config, return_lse=True, return_levels=True)

    out, lse, levels = attend(*qkv)
    assert out.shape == (0, 4, 160, 16) and lse.shape == (0, 4, 160)
    assert levels.shape[:2] == (0, 4) and levels.dtype == jnp.int32
    grads = jax.grad(lambda *qkv: sum(x.sum() for x in attend(*qkv)[:2]), (0, 1, 2))(*qkv)
    assert [x.shape for x in grads] == [x.shape for x in qkv]


@pytest.mark.parametrize("config", CONFIGS[-2:], ids=str)
def test_video_layers(config):
    module, state = PSAVideoAttention(config, warmup_steps=1, record_steps=3), {}
    with jax.debug_nans(True):
        for step in range(3):
            out, state = module.apply(state, *empty(), step=step, mutable=["psa"])
            assert out.shape == (0, 4, 160, 16)


def test_given_levels():
    levels = jnp.zeros((0, 4, 2, 3), jnp.int32)
    q, k, v = empty()

    def attend(q):
        return sparse_attention(q, k, v, levels, block_m=128, block_n=64)

    assert attend(q).shape == q.shape
    assert jax.jvp(attend, (q,), (q,))[1].shape == q.shape


def test_what_does_not_fit_is_still_refused():
    q, k, v = empty()
    with pytest.raises(ValueError, match="k must have the batch of q, 0, got 1"):
        psa_attention(q, jnp.ones((1, 2, 160, 16)), jnp.ones((1, 2, 160, 16)))
    with pytest.raises(ValueError, match="heads of q must be a multiple"):
        psa_attention(q[:, :3], k, v)
