"""Every room against the NumPy specification: integers exactly, floats to float32 rounding."""

import functools
import json
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax import importance, masks, pyramid, selection, similarity, table
from shared_specs import PSAConfig
from shared_specs import importance as np_importance
from shared_specs import masks as np_masks
from shared_specs import pyramid as np_pyramid
from shared_specs import selection as np_selection
from shared_specs import similarity as np_similarity
from shared_specs import table as np_table
from shared_specs.constants import MASK_LEVELS

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
CASES = {case["name"]: case for case in json.loads((GOLDEN / "index.json").read_text())["cases"]}


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def random_levels(rng, *shape):
    return rng.choice(MASK_LEVELS, size=shape).astype(np.int32)


# Pyramid


@pytest.mark.parametrize("block_n", [32, 64, 128])
@pytest.mark.parametrize("length", [1, 7, 64, 333])
def test_pyramid(block_n, length, rng):
    k, v = normal(rng, 2, 2, length, 8), normal(rng, 2, 2, length, 8)
    got = jax.jit(pyramid.build_pyramid, static_argnums=2)(k, v, block_n)
    for x, y in zip(got, np_pyramid.build_pyramid(k, v, block_n), strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, y, rtol=0, atol=3e-7)
        np.testing.assert_array_equal(np.asarray(x) == 0, y == 0)


def test_pyramid_of_low_precision_is_one_rounded_mean(rng):
    k = jnp.asarray(normal(rng, 1, 1, 200, 16), jnp.bfloat16)
    got = pyramid.build_pyramid(k, k, 64).k
    assert got.dtype == jnp.bfloat16
    exact = np_pyramid.build_pyramid(np.asarray(k, np.float32), np.asarray(k, np.float32), 64).k
    np.testing.assert_array_equal(got, jnp.asarray(exact, jnp.bfloat16))


@pytest.mark.parametrize(("length", "block_n"), [(5, 32), (200, 64), (1030, 128)])
def test_pooled_levels_are_those_of_the_pyramid(length, block_n, rng):
    k, v = (jnp.asarray(normal(rng, 1, 2, length, 8), jnp.bfloat16) for _ in range(2))
    whole = pyramid.build_pyramid(k, v, block_n)
    start = np_pyramid.level_start(length, block_n, 2)
    for x, y in zip(pyramid.pool_levels(k, v, block_n), whole, strict=True):
        np.testing.assert_array_equal(x, y[:, :, start:])
    np.testing.assert_array_equal(whole.k[:, :, :length], k)
    np.testing.assert_array_equal(whole.v[:, :, :length], v)


@pytest.mark.parametrize(("length", "block_n"), [(5, 32), (200, 64), (1030, 128)])
def test_unpool_is_the_transpose_of_pooling(length, block_n, rng):
    k = normal(rng, 1, 2, length, 8)

    def pool(k):
        return pyramid.build_pyramid(k, k, block_n).k

    grad = normal(rng, *jax.eval_shape(pool, k).shape)
    unpooled = jax.jit(pyramid.unpool, static_argnums=(1, 2))(grad, length, block_n)
    pulled = jax.jit(lambda k, grad: jax.vjp(pool, k)[1](grad)[0])(k, grad)
    np.testing.assert_allclose(unpooled, pulled, rtol=0, atol=2e-6)


# Importance

ESTIMATORS = [
    PSAConfig(),
    PSAConfig(importance_pool=8, block_m=64, block_n=32, tile_n=8, causal=True),
    PSAConfig(importance_pool=2, block_n=128, causal=True, scale=0.4),
    PSAConfig(importance="sampled", sample_seed=3),
    PSAConfig(importance="sampled", sample_m=5, sample_n=64, causal=True),
    PSAConfig(importance="antidiagonal"),
    PSAConfig(importance="antidiagonal", antidiagonal_stride=16, causal=True, block_n=128),
]


@pytest.mark.parametrize("config", ESTIMATORS, ids=lambda c: f"{c.importance}-{c.causal}")
@pytest.mark.parametrize(("q_len", "kv_len"), [(300, 500), (333, 201)])
def test_scores(config, q_len, kv_len, rng, monkeypatch):
    monkeypatch.setitem(importance.CHUNK_ELEMENTS, "cpu", 1 << 14)  # several chunks
    q, k = normal(rng, 2, 4, q_len, 16), normal(rng, 2, 2, kv_len, 16)
    got = jax.jit(functools.partial(importance.block_scores, config=config))(q, k)
    assert got.dtype == jnp.float32
    exact = np_importance.block_scores(q, k, config)
    np.testing.assert_allclose(got, exact, rtol=2e-5, atol=1e-7)
    np.testing.assert_array_equal(np.asarray(got) == 0, exact == 0)


@pytest.mark.parametrize("importance_name", ["pooled", "sampled", "antidiagonal"])
def test_scores_of_large_logits_are_finite(importance_name, rng):
    q, k = 100 * normal(rng, 1, 1, 200, 16), 100 * normal(rng, 1, 1, 200, 16)
    config = PSAConfig(importance=importance_name)
    got = np.asarray(jax.jit(functools.partial(importance.block_scores, config=config))(q, k))
    assert np.isfinite(got).all() and got.max() > 0


@pytest.mark.parametrize("importance_name", ["pooled", "sampled", "antidiagonal"])
def test_scores_never_take_the_memory_of_all_logits(importance_name):
    config = PSAConfig(importance=importance_name)
    q = jax.ShapeDtypeStruct((1, 4, 32768, 16), jnp.float32)
    scores = jax.jit(functools.partial(importance.block_scores, config=config))
    size = scores.lower(q, q).compile().memory_analysis().temp_size_in_bytes
    per_side = {"pooled": 32768 // 4, "sampled": 32768 // 4, "antidiagonal": 32768 // 8}
    assert size < 4 * per_side[importance_name] ** 2 * 4 / 4


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case["kind"] == "importance"])
def test_golden_importance(name):
    """Recorded samples, taken here as whole blocks of which every token is sampled."""
    recorded, data = CASES[name]["config"], np.load(GOLDEN / CASES[name]["file"])
    q, k = data["sampled_q"], data["sampled_k"]
    m, n = recorded["num_keep_m"], recorded["num_keep_n"]
    rows = importance._Side(jnp.asarray(q), *(np.arange(q.shape[2]),) * 2)
    cols = importance._Side(jnp.asarray(k), *(np.arange(k.shape[2]),) * 2)
    config = types.SimpleNamespace(
        block_m=m, block_n=n, causal=False, resolved_scale=lambda _: recorded["sm_scale"]
    )
    got = np.asarray(importance._scores(rows, cols, q, k, config, importance._largest_ratio))
    want = data["importance"]
    np.testing.assert_allclose(
        got / got.sum(-1, keepdims=True),
        want / want.sum(-1, keepdims=True),
        rtol=1e-5,
        atol=5e-6,
    )


# Selection

FINE = {1: (0, 0.2), 2: (0.2, 0.37), 4: (0.37, 0.61), 8: (0.61, 0.9), 0: (0.9, 1.0)}
MODES = [
    {"mask_mode": "topk"},
    {"mask_mode": "topk", "mask_ratios": FINE, "block_n": 32, "tile_n": 32},
    {"mask_mode": "topk", "mask_ratios": {8: (0, 0.3), 1: (0.3, 0.4), 2: (0.4, 1)}},
    {"mask_mode": "thresholdbound"},
    {"mask_mode": "thresholdbound", "mask_ratios": FINE, "block_n": 32, "tile_n": 32},
    {"mask_mode": "thresholdbound", "mask_ratios": {4: (0, 0.5), 1: (0.5, 0.7), 8: (0.7, 0.97)}},
]
RULES = [
    {},
    {"causal": True},
    {"text_length": 70, "sink_blocks": 2},
    {"text_length": 130, "text_position": "start", "causal": True, "sink_blocks": 1},
]


def kinds_of_scores(rng, shape):
    """Plain ones, many ties, a row of zeros, NaN, and magnitudes down to denormals."""
    scores = rng.random(shape, np.float32)
    scores[:, 0] = np.round(scores[:, 0] * 4) / 4
    scores[:, 0, 0] = 0
    scores[0, 1, :, ::3] = np.nan
    scores[0, 1, 1::2, 1::3] = 0  # behind which NaN stands, too
    scores[0, 1, 1::2, 2::3] = 0
    scores[-1, 1] = np.ldexp(scores[-1, 1], rng.integers(-149, 1, shape[2:])).astype(np.float32)
    scores[-1, -1, 0] = np.float32(1e-42) * rng.integers(0, 9, shape[-1])
    scores[0, 0, -1] = -0.0
    return scores


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_levels_are_exact(mode, rules, rng):
    config = PSAConfig(**mode, **rules)
    q_len, kv_len = (700, 2000) if not rules.get("causal") else (500, 1700)
    n_q, n_k = -(-q_len // config.block_m), -(-kv_len // config.block_n)
    # Text blocks stay at level 1 whatever the cap; without text the cap is left out.
    cap = (
        rng.choice([1, 2, 4, 8], size=(2, 2, n_k)).astype(np.int32)
        if rules.get("text_length")
        else None
    )
    lengths = {"q_len": q_len, "kv_len": kv_len}
    select = jax.jit(functools.partial(selection.select_levels, config=config, **lengths))
    for _ in range(4):
        scores = kinds_of_scores(rng, (2, 4, n_q, n_k))
        got = select(scores, cap=cap)
        assert got.dtype == jnp.int32
        want = np_selection.select_levels(scores, config, cap=cap, **lengths)
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("mask_mode", ["topk", "thresholdbound"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (1, 64), (300, 65), (65, 128)])
def test_levels_of_short_sequences(mask_mode, causal, q_len, kv_len, rng):
    config = PSAConfig(mask_mode=mask_mode, causal=causal)
    scores = rng.random((1, 2, -(-q_len // 128), -(-kv_len // 64)), np.float32)
    select = functools.partial(selection.select_levels, config=config, q_len=q_len, kv_len=kv_len)
    got = jax.jit(select)(scores)
    want = np_selection.select_levels(scores, config, q_len=q_len, kv_len=kv_len)
    np.testing.assert_array_equal(got, want)
    assert (np.asarray(got) > 0).any(-1).all()


def test_levels_are_the_same_with_64_bit_mode(rng):
    config = PSAConfig(mask_mode="thresholdbound", causal=True, text_length=40)
    scores = kinds_of_scores(rng, (2, 4, 4, 20))
    select = functools.partial(selection.select_levels, config=config, q_len=512, kv_len=1280)
    want = jax.jit(select)(scores)
    with jax.enable_x64(True):
        got = jax.jit(select)(scores)
        segments = jax.jit(masks.to_segments)(got)
        built = jax.jit(table.build_table)(got)
    assert {x.dtype for x in (got, segments, *built)} == {jnp.dtype("int32")}
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case["kind"] == "mask"])
def test_golden_masks(name):
    recorded, data = CASES[name]["config"], np.load(GOLDEN / CASES[name]["file"])
    config = PSAConfig(
        block_n=recorded["blocksize"],
        tile_n=recorded["compute_tile"],
        mask_ratios={level: tuple(ends) for level, ends in recorded["mask_ratios"]},
        mask_mode=recorded["mode"].removesuffix("_newtype"),
        min_full_ratio=recorded["min_full_attn_ratio"],
    )
    scores = jnp.asarray(data["attn"])
    lengths = {"q_len": scores.shape[2] * 128, "kv_len": scores.shape[3] * recorded["blocksize"]}
    select = functools.partial(selection.select_levels, config=config, **lengths)
    levels = jax.jit(select)(scores)
    if recorded["mode"].endswith("_newtype"):
        np.testing.assert_array_equal(jax.jit(masks.to_segments)(levels, scores), data["mask"])
        np.testing.assert_array_equal(masks.from_segments(jnp.asarray(data["mask"])), levels)
    else:
        text_columns = 2 if "text" in name else 0  # the original's own text rule stands there
        columns = slice(0, scores.shape[3] - text_columns)
        np.testing.assert_array_equal(levels[..., columns], data["mask"][..., columns])


def test_selection_checks_its_input():
    config, lengths = PSAConfig(), {"q_len": 128, "kv_len": 128}
    good = jnp.ones((1, 2, 1, 2))
    with pytest.raises(ValueError, match=r"scores must be \[B, H, 1, 2\].*\(1, 2, 1, 3\)"):
        selection.select_levels(jnp.ones((1, 2, 1, 3)), config, **lengths)
    with pytest.raises(TypeError, match="scores must be float32, got bfloat16"):
        selection.select_levels(good.astype(jnp.bfloat16), config, **lengths)
    with pytest.raises(ValueError, match="at least 0, got -1"):
        selection.select_levels(good.at[0, 1].set(-1), config, **lengths)
    with pytest.raises(ValueError, match=r"cap must be \[1, Hk, 2\].*\(1, 3, 2\)"):
        selection.select_levels(good, config, **lengths, cap=jnp.ones((1, 3, 2), jnp.int32))


# Similarity cap


@pytest.mark.parametrize("block_n", [32, 128])
@pytest.mark.parametrize("length", [3, 129, 400])
def test_similarity_cap(block_n, length, rng):
    k = normal(rng, 2, 2, length, 16)
    k[0] = np.repeat(k[0, :, : -(-length // 5)], 5, axis=1)[:, :length]  # neighbours alike
    k[1, 0, :20] = 0
    config = PSAConfig(block_n=block_n, tile_n=8, sim_2x_threshold=0.3, sim_4x_threshold=0.1)
    got = jax.jit(functools.partial(similarity.similarity_cap, config=config))(k)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, np_similarity.similarity_cap(k, config))
    for level, want in np_similarity.block_similarity(k, block_n).items():
        alike = jax.jit(similarity.block_similarity, static_argnums=(1, 2))(k, block_n, level)
        np.testing.assert_allclose(alike, want, rtol=0, atol=1e-6)


def test_golden_similarity():
    recorded, data = CASES["ksim_128"]["config"], np.load(GOLDEN / CASES["ksim_128"]["file"])
    thresholds = {f"sim_{n}x_threshold": recorded[f"sim_{n}x_threshold"] for n in (2, 4, 8)}
    config = PSAConfig(block_n=recorded["blocksize"], **thresholds)
    cap = jax.jit(functools.partial(similarity.similarity_cap, config=config))(data["k"])
    np.testing.assert_array_equal(cap, data["sim_mask"])


# Masks and table


@pytest.mark.parametrize("n_k", [1, 9, 40])
def test_segments_both_ways(n_k, rng):
    levels = random_levels(rng, 2, 2, 3, n_k)
    scores = np.round(rng.random(levels.shape, np.float32) * 8) / 8
    scores[0, 0, 0, ::2] = np.nan
    for of_scores in (None, scores):
        want = np_masks.to_segments(levels, of_scores)
        got = jax.jit(masks.to_segments)(levels, of_scores)
        assert got.dtype == jnp.int32
        np.testing.assert_array_equal(got, want)
        for convert in (masks.from_segments, jax.jit(masks.from_segments)):
            got = convert(jnp.asarray(want))
            assert got.dtype == jnp.int32
            np.testing.assert_array_equal(got, levels)


def test_density(rng):
    levels = random_levels(rng, 2, 2, 3, 40)
    candidates = np.array([0, 17, 40])
    for counts in (None, candidates):
        want = np_masks.density(levels, candidates=counts)
        got = masks.density(jnp.asarray(levels), candidates=counts)
        assert isinstance(got, float) and got == want
        traced = jax.jit(functools.partial(masks.density, candidates=counts))(levels)
        np.testing.assert_allclose(traced, want, rtol=1e-6)


def test_masks_check_their_input():
    with pytest.raises(TypeError, match="levels must be an integer array, got float32"):
        masks.to_segments(jnp.ones((1, 1, 1, 2)))
    with pytest.raises(ValueError, match=r"0, 1, 2, 4 or 8, got 3"):
        masks.to_segments(jnp.full((1, 1, 1, 2), 3))
    with pytest.raises(ValueError, match=r"Nk \+ 5.*got \(1, 1, 1, 5\)"):
        masks.from_segments(jnp.zeros((1, 1, 1, 5), jnp.int32))
    with pytest.raises(ValueError, match="closed by -1"):
        masks.from_segments(jnp.zeros((1, 1, 1, 7), jnp.int32))
    with pytest.raises(ValueError, match="scores must have the shape"):
        masks.to_segments(jnp.ones((1, 1, 1, 2), jnp.int32), jnp.ones((1, 1, 1, 3)))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 5, 9), (1, 1, 1, 1), (1, 2, 4, 200)])
def test_table(shape, transposed, rng):
    levels = random_levels(rng, *shape)
    build = jax.jit(functools.partial(table.build_table, transposed=transposed))
    for got, want in zip(
        build(levels), np_table.build_table(levels, transposed=transposed), strict=True
    ):
        assert got.dtype == jnp.int32
        np.testing.assert_array_equal(got, want)
