"""psa_attention end to end: the rooms in their order, JAX's transformations, messages."""

import dataclasses
import functools
import logging
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import psa_jax
from psa_jax import PSAConfig, importance, psa_attention, sparse_attention
from psa_jax._arrays import announce
from psa_jax.attention import IMPLEMENTATIONS, choose, implementations
from psa_jax.importance import block_scores
from psa_jax.masks import from_segments, to_segments
from psa_jax.selection import select_levels
from shared_specs import attention as oracle
from shared_specs import importance as np_importance
from shared_specs import masks as np_masks
from shared_specs import selection as np_selection
from shared_specs import similarity as np_similarity
from tests.jax.attention_contract import QUICK

BLOCKS = {"block_m": 64, "block_n": 32}
SMALL = PSAConfig(**BLOCKS)


def normal(rng, *shape, dtype=jnp.float32):
    return jnp.asarray(rng.standard_normal(shape), dtype)


def qkv(rng, length=200, heads=2, kv_heads=2, head_dim=16, batch=2, dtype=jnp.float32):
    q = normal(rng, batch, heads, length, head_dim, dtype=dtype)
    k, v = (normal(rng, batch, kv_heads, length, head_dim, dtype=dtype) for _ in range(2))
    return q, k, v


CONFIGS = [
    PSAConfig(),
    PSAConfig(causal=True, mask_mode="thresholdbound", importance="sampled", **BLOCKS),
    PSAConfig(
        block_n=128, attn_impl="old_mask_type", use_sim_mask=True, sim_2x_threshold=0.1,
        sink_blocks=1, text_length=20,
    ),
    PSAConfig(importance="antidiagonal", scale=0.3, **BLOCKS),
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.importance}-{c.attn_impl}")
def test_the_whole_call_is_the_specification(config, rng):
    q, k, v = qkv(rng, length=300, heads=4)
    run = functools.partial(psa_attention, config=config, return_lse=True, return_levels=True)
    out, lse, levels = jax.jit(run)(q, k, v)
    arrays = [np.asarray(x) for x in (q, k, v)]
    scores = np_importance.block_scores(arrays[0], arrays[1], config)
    cap = np_similarity.similarity_cap(arrays[1], config) if config.use_sim_mask else None
    want = np_selection.select_levels(scores, config, q_len=300, kv_len=300, cap=cap)
    dense = np.asarray(levels)
    if config.attn_impl == "new_mask_type":
        dense = np_masks.from_segments(dense)
    assert (dense == want).mean() >= 0.999
    want_out, want_lse = oracle.sparse_attention(
        *arrays, dense, block_m=config.block_m, block_n=config.block_n, scale=config.scale,
        is_causal=config.causal, return_lse=True,
    )  # fmt: skip
    np.testing.assert_allclose(out, want_out, rtol=0, atol=3e-6)
    np.testing.assert_allclose(lse, want_lse, rtol=0, atol=3e-6)


def test_the_similarity_cap_reaches_the_levels(rng):
    """Thresholds that bind, on keys that drift: at the defaults every group of 8 passes."""
    q, k, v = qkv(rng, length=700)
    k = jnp.asarray(rng.standard_normal(k.shape).cumsum(2), jnp.float32)
    ratios = {1: (0, 0.1), 8: (0.1, 1)}
    config = PSAConfig(block_n=128, attn_impl="old_mask_type", mask_ratios=ratios)
    thresholds = {"sim_2x_threshold": 0.9, "sim_4x_threshold": 0.9, "sim_8x_threshold": 0.9}
    capped = dataclasses.replace(config, use_sim_mask=True, **thresholds)
    _, plain = psa_attention(q, k, v, config=config, return_levels=True)
    _, levels = psa_attention(q, k, v, config=capped, return_levels=True)
    scores = np_importance.block_scores(np.asarray(q), np.asarray(k), capped)
    cap = np_similarity.similarity_cap(np.asarray(k), capped)
    want = np_selection.select_levels(scores, capped, q_len=700, kv_len=700, cap=cap)
    np.testing.assert_array_equal(levels, want)
    assert (levels < plain).any() and len(np.unique(cap)) > 1


def test_what_is_returned_and_in_which_order(rng):
    q, k, v = qkv(rng)
    run = functools.partial(psa_attention, config=SMALL)
    out = run(q, k, v)
    assert out.shape == q.shape and out.dtype == q.dtype
    out2, levels = run(q, k, v, return_levels=True)
    assert levels.shape == (2, 2, 4, 7 + 5) and levels.dtype == jnp.int32
    out3, lse, levels2 = run(q, k, v, return_lse=True, return_levels=True)
    assert lse.shape == (2, 2, 200) and lse.dtype == jnp.float32
    np.testing.assert_array_equal(out2, out)
    # With lse XLA fuses other passes, and the last bit may differ.
    np.testing.assert_allclose(out3, out, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(levels2, levels)
    # Segments stand by descending score, and mean the same mask in any order.
    scores = block_scores(q, k, SMALL)
    dense = select_levels(scores, SMALL, q_len=200, kv_len=200)
    np.testing.assert_array_equal(to_segments(dense, scores), levels)
    for given in (dense, levels, to_segments(dense)):
        np.testing.assert_allclose(run(q, k, v, levels=given), out, rtol=0, atol=1e-6)


def test_overrides_replace_fields_of_the_configuration(rng):
    q, k, v = qkv(rng)
    want = psa_attention(q, k, v, config=PSAConfig(causal=True, **BLOCKS))
    np.testing.assert_array_equal(psa_attention(q, k, v, config=SMALL, causal=True), want)
    np.testing.assert_array_equal(psa_attention(q, k, v, causal=True, **BLOCKS), want)


@pytest.mark.parametrize("method", ["Gilbert", "Clusters", "Hybrid"])
def test_token_orders_leave_dense_attention_alone(method, rng):
    q, k, v = qkv(rng, length=4 * 6 * 8 + 8)
    everything = {"mask_ratios": {1: (0, 1)}, "return_lse": True, **BLOCKS}
    place = {"grid": (4, 6, 8), "text_length": 8, "text_position": "start"}
    run = functools.partial(psa_attention, **everything, **place)
    want = run(q, k, v)
    got = run(q, k, v, rearrange_method=method)
    chex.assert_trees_all_close(got, want, rtol=0, atol=2e-6)
    moved = psa_attention(q, k, v, rearrange_method=method, **place, **BLOCKS)
    plain = psa_attention(q, k, v, **place, **BLOCKS)
    assert not np.allclose(moved, plain, atol=1e-3), "the order changed nothing"


def test_equal_values_come_back_whatever_is_selected(rng):
    q, k, _ = qkv(rng)
    v = jnp.broadcast_to(normal(rng, 2, 2, 1, 16), q.shape)
    np.testing.assert_allclose(psa_attention(q, k, v, config=SMALL), v, rtol=0, atol=2e-6)


# Transformations


def loss(q, k, v, config=SMALL):
    return (psa_attention(q, k, v, config=config) * jnp.cos(v)).sum()


gradients = jax.grad(loss, (0, 1, 2))


assert_trees_close = functools.partial(chex.assert_trees_all_close, rtol=0, atol=3e-6)


def test_vmap_is_a_longer_batch(rng):
    q, k, v = (normal(rng, 3, 2, 2, 130, 16) for _ in range(3))
    one_by_one = jax.jit(gradients)
    want = [one_by_one(*x) for x in zip(q, k, v, strict=True)]
    want = jax.tree.map(lambda *x: jnp.stack(x), *want)
    assert_trees_close(jax.jit(jax.vmap(gradients))(q, k, v), want)
    shared = jax.jit(jax.vmap(gradients, in_axes=(0, None, None)))(q, k[0], v[0])
    assert_trees_close(jax.tree.map(lambda x: x[0], shared), jax.tree.map(lambda x: x[0], want))


def test_checkpoint_and_scan_over_layers(rng):
    x = normal(rng, 1, 2, 130, 16)
    weights = 0.3 * normal(rng, 3, 3, 16, 16)

    def layer(x, w):
        q, k, v = (x @ each for each in w)
        return x + psa_attention(q, k, v, config=SMALL, causal=True), None

    def by_loop(x, weights):
        for w in weights:
            x, _ = layer(x, w)
        return (x**2).sum()

    def by_checkpoint(x, weights):
        return (jax.lax.scan(jax.checkpoint(layer), x, weights)[0] ** 2).sum()

    want = jax.jit(jax.value_and_grad(by_loop, (0, 1)))(x, weights)
    got = jax.jit(jax.value_and_grad(by_checkpoint, (0, 1)))(x, weights)

    def check(x, y):
        # Rounding is that of the largest numbers, from which small ones are differences.
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-6 * float(jnp.abs(y).max()))

    jax.tree.map(check, got, want)


def test_export(rng):
    arrays = qkv(rng, length=130)
    program = export.export(jax.jit(gradients))(*arrays)
    assert_trees_close(program.call(*arrays), jax.jit(gradients)(*arrays))


def test_no_gradient_through_the_choice_of_levels(rng):
    """With the levels held fixed from outside the gradients are the same, bit for bit."""
    q, k, v = qkv(rng, length=300)
    levels = psa_attention(q, k, v, config=SMALL, return_levels=True)[1]

    def fixed(q, k, v):
        return (psa_attention(q, k, v, config=SMALL, levels=levels) * jnp.cos(v)).sum()

    quick = functools.partial(jax.jit, compiler_options=QUICK)
    got, want = quick(gradients)(q, k, v), quick(jax.grad(fixed, (0, 1, 2)))(q, k, v)
    chex.assert_trees_all_equal(got, want)

    def through_scores(q, k):
        scores = block_scores(q, k, SMALL)
        return scores.sum() + select_levels(scores, SMALL, q_len=300, kv_len=300).sum()

    for x in jax.grad(through_scores, (0, 1))(q, k):
        assert not x.any()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mixed_precision(dtype, rng):
    """Low-precision inputs give low-precision results and gradients close to float32's."""
    arrays = qkv(rng, length=300, head_dim=32, dtype=jnp.float32)
    levels = psa_attention(*arrays, config=SMALL, return_levels=True)[1]

    def of(*arrays):
        return (psa_attention(*arrays, config=SMALL, levels=levels).astype(jnp.float32) ** 2).sum()

    value_and_grads = jax.jit(jax.value_and_grad(of, (0, 1, 2)))
    low = value_and_grads(*(x.astype(dtype) for x in arrays))
    high = value_and_grads(*arrays)
    assert {x.dtype for x in low[1]} == {jnp.dtype(dtype)}
    for x, y in zip(jax.tree.leaves(low), jax.tree.leaves(high), strict=True):
        error = np.linalg.norm(np.asarray(x, np.float64) - y) / np.linalg.norm(y)
        assert error < (0.01 if dtype == "float16" else 0.06)


# Dispatch and messages


def test_dispatch_says_once_what_runs(rng, caplog):
    implementations.announce.forget()
    q, k, v = qkv(rng)
    with caplog.at_level(logging.INFO, logger="psa_jax"):
        for _ in range(2):
            assert choose(None, q, k, v, **BLOCKS) == "gather"
    (record,) = caplog.records
    assert "'gather'" in record.message and "q is on cpu, not gpu" in record.message
    assert choose("gather", q, k, v, **BLOCKS) == "gather"
    assert list(IMPLEMENTATIONS) == ["mosaic", "gather"]


def test_what_a_gpu_does_without_a_kernel_is_a_warning(rng, caplog, monkeypatch):
    q, k, v = (jnp.zeros((1, 1, 64, 192), jnp.bfloat16) for _ in range(3))
    announce.forget()
    for module in (implementations, importance):
        monkeypatch.setattr(module, "platform_of", lambda x: "gpu")
    with caplog.at_level(logging.INFO, logger="psa_jax"):
        for _ in range(2):
            assert choose(None, q, k, v, **BLOCKS) == "gather"
            jax.eval_shape(lambda q: block_scores(q, k, SMALL), q)
    attention, scores = caplog.records
    for record in (attention, scores):
        assert record.levelname == "WARNING"
        assert "takes head dimensions up to 128, got 192" in record.message
        assert "memory" in record.message


def test_an_implementation_asked_for_by_name_is_used_or_refused(rng):
    q, k, v = qkv(rng)
    with pytest.raises(ValueError, match="implementation 'mosaic' cannot run on this input: .*"):
        psa_attention(q, k, v, config=SMALL, implementation="mosaic")
    with pytest.raises(ValueError, match="one of 'mosaic', 'gather', got 'triton'"):
        psa_attention(q, k, v, config=SMALL, implementation="triton")


def test_messages_name_the_argument_and_what_is_accepted(rng):
    q, k, v = qkv(rng)
    attend = functools.partial(sparse_attention, levels=jnp.ones((2, 2, 4, 7), jnp.int32), **BLOCKS)
    attend(q, k, v)
    dims = tuple(x[..., :12] for x in (q, k, v))
    ones = jnp.ones((1, 2, 4, 7), jnp.int32)
    threes = jnp.full((2, 2, 4, 7), 3)
    psa = functools.partial(psa_attention, q, k, v)
    for error, message, call in (
        (TypeError, "q must be a jax.Array, got list", lambda: attend([1.0], k, v)),
        (ValueError, r"q must be \[B, H, Lq, D\], got shape", lambda: attend(q[0], k, v)),
        (TypeError, "q must be float16, .*got int32", lambda: attend(q.astype(int), k, v)),
        (TypeError, "one dtype", lambda: attend(q, k.astype(jnp.float16), v)),
        (ValueError, "v must have the shape of k", lambda: attend(q, k, v[:, :, 1:])),
        (ValueError, "multiple of 8 in 8..256, got 12", lambda: attend(*dims)),
        (ValueError, r"block_m must be one of \(64, 128\)", lambda: attend(q, k, v, block_m=32)),
        (ValueError, "scale must be a number, or an array", lambda: attend(q, k, v, scale=q)),
        (ValueError, "scale must be finite", lambda: attend(q, k, v, scale=float("inf"))),
        (TypeError, "is_causal must be True or False", lambda: attend(q, k, v, is_causal=1)),
        (TypeError, "levels must be an integer", lambda: attend(q, k, v, levels=ones * 1.0)),
        (ValueError, r"\(2, 2, 4, 7\).*got \(1, 2, 4, 7\)", lambda: attend(q, k, v, levels=ones)),
        (ValueError, "0, 1, 2, 4 or 8, got 3", lambda: attend(q, k, v, levels=threes)),
        (TypeError, "config must be a PSAConfig or None, got dict", lambda: psa(config={})),
        (TypeError, r"unknown arguments \['blok_m'\]", lambda: psa(blok_m=64)),
        (TypeError, "return_lse must be True or False", lambda: psa(return_lse=1)),
        (ValueError, "grid", lambda: psa(rearrange_method="Gilbert")),
    ):
        with pytest.raises(error, match=message):
            call()


def test_levels_inside_jit_that_are_not_levels_skip_the_block(rng):
    """Values cannot be looked at there; they must not reach memory outside the pyramid."""
    q, k, v = qkv(rng)
    attend = functools.partial(sparse_attention, **BLOCKS)
    good = jnp.asarray(rng.choice([0, 1, 2, 4, 8], size=(2, 2, 4, 7)), jnp.int32)
    bad = jnp.where(good == 0, jnp.asarray([3, -1, 1 << 30, 5, 16, 7, -8]), good)
    np.testing.assert_array_equal(jax.jit(attend)(q, k, v, bad), jax.jit(attend)(q, k, v, good))
    segments = to_segments(good)
    mangled = jnp.where(segments == -1, segments, segments * 1000)
    assert np.isfinite(jax.jit(attend)(q, k, v, mangled)).all()
    np.testing.assert_array_equal(from_segments(segments), good)


def test_importing_it_loads_no_torch_and_not_the_kernels():
    program = "import psa_jax, sys; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    loaded = run.stdout.split()
    assert "psa_jax.attention" in loaded
    assert "torch" not in loaded and "psa_jax.attention.mosaic" not in loaded


def test_without_jax_the_import_says_what_to_install():
    program = "import sys; sys.modules['jax'] = None; import psa_jax"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "pip install pyramid-sparse-attention[jax]" in run.stderr


def test_what_the_package_exports():
    for name in psa_jax.__all__:
        assert getattr(psa_jax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'attention_function'"):
        psa_jax.attention_function  # noqa: B018
