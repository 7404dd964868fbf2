"""Scores to levels: the ends of each mode, ties, and the fixed rules, on cases worked by hand."""

import numpy as np
import pytest

from shared_specs import PSAConfig
from shared_specs.selection import candidate_blocks, rank_blocks, select_levels, text_blocks


def descending(n_q, n_k):
    """Scores whose rank order is the block order."""
    return np.broadcast_to(np.linspace(1, 0.1, n_k, dtype=np.float32), (1, 1, n_q, n_k)).copy()


def levels_of(n_k, **fields):
    config = PSAConfig(**fields)
    return select_levels(descending(1, n_k), config, q_len=1, kv_len=n_k * config.block_n)[0, 0, 0]


def test_topk_shares_are_truncated():
    # 0.1 * 20 = 2, 0.15 * 20 = 3, level 8 from 3 to 7: 4 blocks, whole tiles of merge(8) = 4
    np.testing.assert_array_equal(levels_of(20), [1] * 2 + [2] + [8] * 4 + [0] * 13)


def test_topk_rounds_up_to_whole_tiles():
    # ends 1, 2, 2, 6 of 18 blocks: level 8 wants ranks 2..5, exactly one tile
    # with 26 blocks: ends 2, 3, 3, 9: six blocks of level 8 become eight
    np.testing.assert_array_equal(levels_of(26), [1] * 2 + [2] + [8] * 8 + [0] * 15)


def test_topk_rounds_down_at_the_end_of_the_row():
    ratios = {1: (0, 0.5), 8: (0.5, 1.0)}
    # 11 blocks: level 1 gets 5, level 8 wants 6 -> 8 would pass the end -> 4, two are skipped
    np.testing.assert_array_equal(levels_of(11, mask_ratios=ratios), [1] * 5 + [8] * 4 + [0] * 2)
    # 8 blocks, level 8 alone on the last 3: not one whole tile
    np.testing.assert_array_equal(levels_of(8, mask_ratios={1: (0, 0.625), 8: (0.625, 1)}),
                                  [1] * 5 + [0] * 3)  # fmt: skip


def test_topk_product_is_float64():
    # 0.7 * 10 is 7.000000000000001 - or 6.999999 in another precision; 0.29 * 100 truncates to 28
    ratios = {1: (0, 0.29)}
    assert (levels_of(100, mask_ratios=ratios) == 1).sum() == int(100 * 0.29) == 28


def test_a_level_zero_range_between_others_is_skipped_blocks():
    ratios = {1: (0, 0.25), 0: (0.25, 0.5), 2: (0.5, 1.0)}
    np.testing.assert_array_equal(levels_of(8, mask_ratios=ratios), [1, 1, 0, 0, 2, 2, 2, 2])


def test_thresholdbound_includes_the_block_that_crosses():
    scores = np.array([0.5, 0.25, 0.125, 0.125], np.float32).reshape(1, 1, 1, 4)
    ratios = {1: (0, 0.6), 2: (0.6, 0.75), 0: (0.75, 1)}
    config = PSAConfig(mask_ratios=ratios, mask_mode="thresholdbound")
    # cumulative .5 .75 .875 1: one block inside .6, the second crosses; inside .75 + 1e-6 two
    # blocks, the third crosses
    levels = select_levels(scores, config, q_len=128, kv_len=256)
    np.testing.assert_array_equal(levels[0, 0, 0], [1, 1, 2, 0])


def test_thresholdbound_keeps_the_least_share_of_full_blocks():
    scores = np.zeros((1, 1, 1, 100), np.float32)
    scores[..., 0] = 1.0
    ratios = {1: (0, 0.5), 0: (0.5, 1)}
    few = PSAConfig(mask_ratios=ratios, mask_mode="thresholdbound")
    none = PSAConfig(mask_ratios=ratios, mask_mode="thresholdbound", min_full_ratio=0.0)
    lengths = {"q_len": 128, "kv_len": 6400}
    # nothing lies inside .5 of the score (block 0 alone exceeds it), so only the floor counts
    assert (select_levels(scores, few, **lengths) == 1).sum() == 7
    assert (select_levels(scores, none, **lengths) == 1).sum() == 1


def test_thresholdbound_is_scale_free():
    rng = np.random.default_rng(0)
    scores = rng.random((2, 3, 4, 37), np.float32)
    config = PSAConfig(mask_mode="thresholdbound")
    lengths = {"q_len": 4 * 128, "kv_len": 37 * 64}
    expected = select_levels(scores, config, **lengths)
    for factor in (2.0**-100, 0.5, 2.0**60):
        np.testing.assert_array_equal(
            select_levels(scores * np.float32(factor), config, **lengths), expected
        )


@pytest.mark.parametrize("mode", ["topk", "thresholdbound"])
def test_equal_scores_go_to_the_lower_block(mode):
    scores = np.full((1, 1, 1, 40), 0.5, np.float32)
    levels = select_levels(scores, PSAConfig(mask_mode=mode), q_len=1, kv_len=40 * 64)[0, 0, 0]
    ranks = [np.flatnonzero(levels == level) for level in (1, 2, 8)]
    assert len(ranks[0]) and ranks[0].max() < ranks[1].min() <= ranks[1].max() < ranks[2].min()


def test_all_zero_scores_give_full_resolution_in_thresholdbound():
    scores = np.zeros((1, 1, 1, 9), np.float32)
    config = PSAConfig(mask_mode="thresholdbound")
    assert (select_levels(scores, config, q_len=1, kv_len=9 * 64) == 1).all()


def test_rank_order_nan_then_invisible():
    scores = np.array([0.2, np.nan, 0.7, 0.7, 0.0, 9.0], np.float32).reshape(1, 1, 1, 6)
    order = rank_blocks(scores, np.array([5]))
    np.testing.assert_array_equal(order[0, 0, 0], [2, 3, 0, 4, 1, 5])


def test_candidates_of_causal_rows():
    config = PSAConfig(causal=True)
    np.testing.assert_array_equal(candidate_blocks(300, 300, config), [2, 4, 5])
    np.testing.assert_array_equal(candidate_blocks(200, 520, config), [7, 9])
    np.testing.assert_array_equal(candidate_blocks(300, 100, config), [0, 1, 2])


def test_causal_hides_the_future_and_keeps_the_diagonal_full():
    rng = np.random.default_rng(1)
    config = PSAConfig(causal=True, mask_ratios={8: (0, 1)}, block_n=128, tile_n=8)
    levels = select_levels(rng.random((1, 1, 4, 4), np.float32), config, q_len=512, kv_len=512)[
        0, 0
    ]
    assert (np.triu(levels, 1) == 0).all()
    assert (np.diag(levels) == 1).all()
    assert (levels[1:, 0] >= 1).all()


def test_causal_straddling_needs_some_row_that_sees_part():
    config = PSAConfig(causal=True, mask_ratios={8: (0, 1)}, block_m=64, block_n=64, tile_n=8)
    # offset 64: rows 0..63 stand at keys 64..127; block 1 straddles, block 0 is wholly visible
    levels = select_levels(np.ones((1, 1, 1, 2), np.float32), config, q_len=64, kv_len=128)
    assert levels[0, 0, 0, 1] == 1


def test_row_without_a_level_gets_its_best_block():
    scores = np.array([0.1, 0.9, 0.3], np.float32).reshape(1, 1, 1, 3)
    levels = select_levels(scores, PSAConfig(), q_len=128, kv_len=192)  # 0.1 * 3 truncates to 0
    np.testing.assert_array_equal(levels[0, 0, 0], [0, 1, 0])


def test_sinks_and_text():
    ratios = {8: (0, 1)}
    config = PSAConfig(mask_ratios=ratios, sink_blocks=2, tile_n=8)
    levels = select_levels(np.ones((1, 1, 3, 9), np.float32), config, q_len=300, kv_len=576)
    assert (levels[..., :2] == 1).all() and (levels[..., 2:] == 8).all()
    config = PSAConfig(mask_ratios=ratios, text_length=70, tile_n=8)
    levels = select_levels(np.ones((1, 1, 3, 9), np.float32), config, q_len=300, kv_len=576)
    # keys 506..575 lie in blocks 7, 8; queries 230..299 in blocks 1, 2
    assert (levels[..., 7:] == 1).all() and (levels[..., 1:, :] == 1).all()
    assert (levels[..., 0, :7] == 8).all()


def test_text_at_the_start():
    q_text, k_text = text_blocks(300, 576, PSAConfig(text_length=65, text_position="start"))
    np.testing.assert_array_equal(np.flatnonzero(q_text), [0])
    np.testing.assert_array_equal(np.flatnonzero(k_text), [0, 1])


def test_text_of_causal_queries_counts_by_position():
    config = PSAConfig(text_length=100, text_position="start", causal=True)
    q_text, _ = text_blocks(64, 576, config)  # the queries stand at keys 512..575
    assert not q_text.any()
    q_text, _ = text_blocks(64, 576, PSAConfig(text_length=100, text_position="end", causal=True))
    assert q_text.all()


def test_cap_limits_levels_before_the_fixed_rules():
    ratios = {1: (0, 0.25), 8: (0.25, 0.75)}
    config = PSAConfig(mask_ratios=ratios, tile_n=8, sink_blocks=1)
    cap = np.array([8, 1, 1, 2, 4, 8, 8, 8], np.int32).reshape(1, 1, 8)
    scores = np.repeat(descending(1, 8), 2, axis=1)
    levels = select_levels(scores, config, q_len=1, kv_len=512, cap=cap)
    np.testing.assert_array_equal(levels[0, 0, 0], [1, 1, 1, 2, 4, 8, 0, 0])
    np.testing.assert_array_equal(levels[0, 1], levels[0, 0])


@pytest.mark.parametrize(
    "scores, words",
    [
        (np.ones((1, 1, 2, 3), np.float32), ["[B, H, 1, 3]", "(1, 1, 2, 3)"]),
        (np.ones((1, 1, 3), np.float32), ["[B, H, 1, 3]"]),
        (-np.ones((1, 1, 1, 3), np.float32), ["at least 0", "-1"]),
    ],
)
def test_bad_scores(scores, words):
    with pytest.raises(ValueError) as caught:
        select_levels(scores, PSAConfig(), q_len=128, kv_len=192)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("cap", "error", "words"),
    [
        (np.ones((1, 3, 3), np.int32), ValueError, "cap must be .1, Hk, 3. .* of 4, got .1, 3, 3."),
        (np.ones((2, 4, 3), np.int32), ValueError, "got .2, 4, 3."),
        (np.ones((1, 4, 2), np.int32), ValueError, "got .1, 4, 2."),
        (np.ones((4, 3), np.int32), ValueError, "got .4, 3."),
        (np.ones((1, 4, 3), np.float32), TypeError, "cap must hold integers, got float32"),
    ],
)
def test_bad_caps(cap, error, words):
    scores = np.ones((1, 4, 1, 3), np.float32)
    with pytest.raises(error, match=words):
        select_levels(scores, PSAConfig(), q_len=128, kv_len=192, cap=cap)
    for kv_heads in (1, 2, 4):
        good = np.ones((1, kv_heads, 3), np.int32)
        select_levels(scores, PSAConfig(), q_len=128, kv_len=192, cap=good)
