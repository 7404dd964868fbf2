"""Pyramid, sampling, importance, masks, table, similarity, flops: against direct restatements."""

import numpy as np
import pytest

from shared_specs import LEVELS, PSAConfig
from shared_specs.flops import attention_flops, visited_tokens
from shared_specs.importance import block_scores
from shared_specs.masks import density, from_segments, to_segments
from shared_specs.pyramid import build_pyramid, level_start, pooled_counts, pyramid_rows
from shared_specs.sampling import SamplePlan
from shared_specs.similarity import block_similarity, similarity_cap
from shared_specs.table import build_table


@pytest.mark.parametrize("kv_len", [1, 7, 64, 65, 129, 300])
@pytest.mark.parametrize("block_n", [32, 64, 128])
def test_pyramid_rows_are_means_over_real_keys(block_n, kv_len, rng):
    k, v = (rng.standard_normal((1, 2, kv_len, 8)).astype(np.float32) for _ in range(2))
    pyramid, counts = build_pyramid(k, v, block_n), pooled_counts(kv_len, block_n)
    assert pyramid.k.shape == (1, 2, pyramid_rows(kv_len, block_n), 8) == pyramid.v.shape
    assert counts.shape == (pyramid.k.shape[2],) and pyramid.k.dtype == np.float32
    padded = -(-kv_len // block_n) * block_n
    for level in LEVELS:
        for t in range(padded // level):
            row = level_start(kv_len, block_n, level) + t
            covered = slice(t * level, min((t + 1) * level, kv_len))
            assert counts[row] == max(covered.stop - covered.start, 0)
            for pooled, x in zip(pyramid, (k, v), strict=True):
                if counts[row]:
                    np.testing.assert_allclose(
                        pooled[:, :, row], x[:, :, covered].mean(2), rtol=2e-6, atol=1e-7
                    )
                else:
                    assert not pooled[:, :, row].any()


def test_pooling_half_precision_rounds_once():
    # a chain of rounded halves would lose the small terms
    k = np.array([2048, 1, 1, 1, 1, 1, 1, 1], np.float16).reshape(1, 1, 8, 1)
    pyramid = build_pyramid(k, k, 32)
    assert pyramid.k[0, 0, level_start(8, 32, 8), 0] == np.float16(2055 / 8)


def test_sample_plan_is_the_philox_order():
    plan = SamplePlan(128, 32, 5)
    raw = np.random.Philox(key=5).random_raw(128)
    assert set(plan.offsets) == set(sorted(range(128), key=lambda i: (raw[i], i))[:32])
    assert (np.diff(plan.offsets) > 0).all() and plan.offsets.dtype == np.int32
    np.testing.assert_array_equal(SamplePlan(4, 2, 0).offsets, SamplePlan(4, 2, 0).offsets)
    # the stream is part of the specification: these values never change
    assert SamplePlan(64, 8, 0).offsets.tolist() == EXPECTED_64_8_0
    with pytest.raises(ValueError, match="count"):
        SamplePlan(8, 9, 0)


EXPECTED_64_8_0 = [0, 2, 11, 20, 21, 38, 43, 54]


def literal_scores(q, k, config):
    """Section 5 one pair at a time."""
    q_len, kv_len, bm, bn = q.shape[2], k.shape[2], config.block_m, config.block_n
    offset = kv_len - q_len
    scale = q.shape[3] ** -0.5
    g = config.importance_pool
    if config.importance == "pooled":
        rows = [(i // bm, range(i, min(i + g, q_len))) for i in range(0, q_len, g)]
        cols = [(j // bn, range(j, min(j + g, kv_len))) for j in range(0, kv_len, g)]
    else:
        at_m = SamplePlan(bm, config.resolved_sample_m, config.sample_seed).offsets
        at_n = SamplePlan(bn, config.resolved_sample_n, config.sample_seed + 1).offsets
        rows = [(i, [min(i * bm + o, q_len - 1)]) for i in range(-(-q_len // bm)) for o in at_m]
        cols = [(j, [min(j * bn + o, kv_len - 1)]) for j in range(-(-kv_len // bn)) for o in at_n]
    scores = np.zeros((*q.shape[:2], -(-q_len // bm), -(-kv_len // bn)))
    for b, h in np.ndindex(q.shape[:2]):
        kv = h // (q.shape[1] // k.shape[1])
        keys = np.array([k[b, kv, list(col)].mean(0) for _, col in cols])
        for i, row in rows:
            seen = np.array([not config.causal or c[0] <= row[-1] + offset for _, c in cols])
            if not seen.any():
                continue
            logits = scale * keys @ q[b, h, list(row)].mean(0)
            weights = np.exp(logits - logits[seen].max())
            for c in np.flatnonzero(seen):
                j = cols[c][0]
                scores[b, h, i, j] = max(scores[b, h, i, j], weights[c])
    return scores


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(200, 200), (130, 301), (301, 130)])
@pytest.mark.parametrize("importance, pool", [("pooled", 4), ("pooled", 8), ("sampled", 4)])
def test_scores_match_the_formula(importance, pool, lengths, causal, rng):
    q = rng.standard_normal((2, 4, lengths[0], 8))
    k = rng.standard_normal((2, 2, lengths[1], 8))
    config = PSAConfig(
        block_m=64, block_n=32, importance=importance, importance_pool=pool, causal=causal,
        sample_seed=3,
    )  # fmt: skip
    scores = block_scores(q, k, config)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, literal_scores(q, k, config), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(128, 128), (77, 203), (203, 77)])
def test_antidiagonal_scores_match_the_formula(lengths, causal, rng):
    q_len, kv_len = lengths
    q, k = rng.standard_normal((1, 2, q_len, 8)), rng.standard_normal((1, 1, kv_len, 8))
    config = PSAConfig(
        block_m=64, block_n=32, importance="antidiagonal", antidiagonal_stride=8, causal=causal
    )
    expected = np.zeros((1, 2, -(-q_len // 64), -(-kv_len // 32)))
    for h in range(2):
        for a in range(0, q_len, 8):
            sums = {}
            for c in range(0, kv_len, 8):
                if causal and c > min(a + 8, q_len) - 1 + kv_len - q_len:
                    continue
                sums[c] = 8**-0.5 * sum(
                    q[0, h, a + i] @ k[0, 0, c + 7 - i]
                    for i in range(8)
                    if a + i < q_len and c + 7 - i < kv_len
                )
            if sums:
                weights = np.exp(np.array(list(sums.values())) - max(sums.values()))
                for c, w in zip(sums, weights / weights.sum(), strict=True):
                    expected[0, h, a // 64, c // 32] += w
    np.testing.assert_allclose(block_scores(q, k, config), expected, rtol=1e-5, atol=1e-7)


def test_segments_round_trip_and_order(rng):
    levels = rng.choice([0, 1, 2, 4, 8], (2, 2, 3, 17)).astype(np.int32)
    scores = rng.random(levels.shape)
    by_id, by_score = to_segments(levels), to_segments(levels, scores)
    assert by_id.shape == (2, 2, 3, 22) and by_id.dtype == np.int32
    np.testing.assert_array_equal(from_segments(by_id), levels)
    np.testing.assert_array_equal(from_segments(by_score), levels)
    for row in np.ndindex(levels.shape[:3]):
        expected = []
        for level in (1, 2, 4, 8, 0):
            ids = [j for j in range(17) if levels[row][j] == level]
            expected += sorted(ids, key=lambda j: -scores[row][j]) + [-1]
        assert by_score[row].tolist() == expected


@pytest.mark.parametrize(
    "row, words",
    [
        ([0, -1, 1, -1, -1, -1, 2], "closed by -1"),
        ([0, 1, -1, -1, -1, -1, -1, -1], "closed by -1"),
        ([0, 0, -1, -1, -1, -1, -1], "each block id 0..1 once"),
        ([0, 2, -1, -1, -1, -1, -1], "each block id 0..1 once"),
        ([0, -2, -1, -1, -1, -1, -1], "each block id 0..1 once"),
        ([-1, -1, -1, -1, -1], "Nk >= 1"),
    ],
)
def test_broken_segments_are_refused(row, words):
    with pytest.raises(ValueError, match=words):
        from_segments(np.array(row).reshape(1, 1, 1, -1))
    with pytest.raises(TypeError, match="integers"):
        from_segments(np.array(row, float).reshape(1, 1, 1, -1))


@pytest.mark.parametrize("transposed", [False, True])
def test_table_lists_blocks_by_level(transposed, rng):
    levels = rng.choice([0, 1, 2, 4, 8], (1, 2, 5, 9)).astype(np.int32)
    entries, counts = build_table(levels, transposed=transposed)
    rows = np.swapaxes(levels, 2, 3) if transposed else levels
    assert entries.shape == rows.shape and counts.shape == (*rows.shape[:3], 4)
    assert entries.dtype == counts.dtype == np.int32 and entries.flags.c_contiguous
    for row in np.ndindex(rows.shape[:3]):
        expected = [j for level in LEVELS for j in range(rows.shape[3]) if rows[row][j] == level]
        assert entries[row].tolist() == expected + [-1] * (rows.shape[3] - len(expected))
        assert counts[row].tolist() == [(rows[row] == level).sum() for level in LEVELS]


def test_density_counts_candidates_only():
    levels = np.array([[1, 0, 0, 0], [2, 8, 1, 0]], np.int32)[None, None]
    assert density(levels) == pytest.approx((1 + 0.5 + 0.125 + 1) / 8)
    assert density(levels, candidates=np.array([1, 3])) == pytest.approx((1 + 1.625) / 4)
    assert density(levels, candidates=np.array([0, 0])) == 0.0
    got = density(levels, candidates=np.array([2, 4]), rest_share=1 / 64)
    assert got == pytest.approx((1 + 1.625 + 2 / 64) / 6)


def test_similarity_of_hand_made_groups():
    k = np.zeros((1, 1, 70, 8))
    k[0, 0, :, 0] = 1.0
    k[0, 0, 64:, 1] = np.arange(6)  # the ragged block has 6 keys: 3 pairs, 1 group of 4, no 8
    similarity = block_similarity(k, 64)

    def angle(a, b):
        return (1 + a * b) / np.sqrt((1 + a * a) * (1 + b * b))

    np.testing.assert_allclose(
        similarity[2][0, 0], [1, (angle(0, 1) + angle(2, 3) + angle(4, 5)) / 3]
    )
    np.testing.assert_allclose(similarity[4][0, 0], [1, angle(0, 3)], rtol=1e-6)
    assert np.isneginf(similarity[8][0, 0, 1])
    config = PSAConfig(sim_2x_threshold=0.99, sim_4x_threshold=0.2, sim_8x_threshold=0.5)
    np.testing.assert_array_equal(similarity_cap(k, config), [[[8, 4]]])  # not monotone: 4 passes


def test_flops_count_real_pooled_tokens():
    levels = np.array([[1, 8, 2]], np.int32)[None, None]  # kv_len 130: the last block has 2 keys
    np.testing.assert_array_equal(visited_tokens(levels, 130, 64), [[[64 + 8 + 1]]])
    assert attention_flops(levels, 100, 130, 32, 128, 64) == 4 * 32 * 73 * 100


def test_flops_of_the_rest():
    levels = np.array([[8, 0, 0], [0, 0, 1]], np.int32)[None, None]
    tokens = {"kv_len": 130, "block_n": 64, "rest": "mean"}
    np.testing.assert_array_equal(visited_tokens(levels, **tokens), [[[8 + 2, 2 + 2]]])
    candidates = np.array([2, 3])
    np.testing.assert_array_equal(
        visited_tokens(levels, **tokens, candidates=candidates), [[[8 + 1, 2 + 2]]]
    )
    flops = attention_flops(levels, 100, 130, 32, 64, 64, rest="mean", candidates=candidates)
    assert flops == 4 * 32 * (9 * 64 + 4 * 36)
