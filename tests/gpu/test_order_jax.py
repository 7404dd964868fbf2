"""k-means and the video module on a GPU under JAX: agreement, repeatability, one program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax import PSAVideoAttention, density_records
from psa_jax.order import kmeans, lloyd
from shared_specs import PSAConfig
from shared_specs.order import clustering

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_labels_agree_with_the_specification_from_equal_centroids(dtype):
    tokens = (jax.random.normal(jax.random.key(0), (1, 2, 6000, 128)) + 20).astype(dtype)
    start = tokens[:, :, clustering.evenly_spaced(6000, 187)].astype(jnp.float32)
    labels, _ = lloyd(tokens, start, 0)
    expected = clustering.assign(np.asarray(tokens, np.float32), np.asarray(start))
    assert np.mean(np.asarray(labels) == expected) >= 0.999


def test_kmeans_repeats_itself_bit_for_bit():
    tokens = jax.random.normal(jax.random.key(1), (1, 4, 20_000, 64), jnp.bfloat16)
    for ours, again in zip(kmeans(tokens, 300), kmeans(tokens, 300), strict=True):
        np.testing.assert_array_equal(ours, again)


def test_the_video_module_carries_its_state():
    config = PSAConfig(rearrange_method="SemanticAware", grid=(6, 16, 20), text_length=77)
    module = PSAVideoAttention(config, warmup_steps=1, record_steps=3)
    qkv = jax.random.normal(jax.random.key(2), (3, 1, 4, 6 * 16 * 20 + 77, 64), jnp.bfloat16)
    run = jax.jit(lambda state, step: module.apply(state, *qkv, step=step, mutable=["psa"]))
    state = {}
    for step in range(3):
        out, state = run(state, step)
        assert jnp.isfinite(out.astype(jnp.float32)).all()
    assert len(density_records(state)) == 3 * 4
    assert int(state["psa"]["centroids_step"]) == 2
