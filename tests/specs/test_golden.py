"""The NumPy specification against recorded outputs of the original implementation."""

import json
from pathlib import Path

import numpy as np
import pytest

from shared_specs import PSAConfig
from shared_specs.attention import sparse_attention, sparse_attention_grad
from shared_specs.importance import _ratio_to_row_maximum
from shared_specs.masks import from_segments, to_segments
from shared_specs.selection import select_levels
from shared_specs.similarity import similarity_cap

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
CASES = {case["name"]: case for case in json.loads((GOLDEN / "index.json").read_text())["cases"]}


def load(name):
    return CASES[name]["config"], np.load(GOLDEN / CASES[name]["file"])


def of_kind(kind):
    return [name for name, case in CASES.items() if case["kind"] == kind]


@pytest.mark.parametrize("name", of_kind("mask"))
def test_masks_are_exact(name):
    recorded, data = load(name)
    config = PSAConfig(
        block_n=recorded["blocksize"],
        tile_n=recorded["compute_tile"],
        mask_ratios={level: tuple(ends) for level, ends in recorded["mask_ratios"]},
        mask_mode=recorded["mode"].removesuffix("_newtype"),
        min_full_ratio=recorded["min_full_attn_ratio"],
    )
    scores = data["attn"]
    lengths = {"q_len": scores.shape[2] * 128, "kv_len": scores.shape[3] * recorded["blocksize"]}
    levels = select_levels(scores, config, **lengths)
    if recorded["mode"].endswith("_newtype"):
        np.testing.assert_array_equal(to_segments(levels, scores), data["mask"])
        np.testing.assert_array_equal(from_segments(data["mask"]), levels)
    else:
        text_columns = 2 if "text" in name else 0  # the original's own text rule stands there
        columns = slice(0, scores.shape[3] - text_columns)
        np.testing.assert_array_equal(levels[..., columns], data["mask"][..., columns])


@pytest.mark.parametrize("name", of_kind("forward"))
def test_forward(name):
    recorded, data = load(name)
    out = sparse_attention(
        data["q"],
        data["k"],
        data["v"],
        data["levels"],
        block_m=recorded["block_m"],
        block_n=recorded["block_n"],
        scale=recorded["sm_scale"],
        is_causal=recorded["causal"],
    )
    rows = _comparable_rows(name, data, recorded["block_m"])
    assert rows.any()
    np.testing.assert_allclose(out[rows], data["out"][rows], rtol=0, atol=5e-7)


def test_backward_dq():
    recorded, data = load("bwd_legacy_200")
    dq, _, _ = sparse_attention_grad(
        data["q"],
        data["k"],
        data["v"],
        data["levels"],
        data["do"],
        block_m=recorded["block_m"],
        block_n=recorded["block_n"],
        scale=recorded["sm_scale"],
    )
    rows = _comparable_rows("bwd_legacy_200", data, recorded["block_m"])
    assert rows.any()
    np.testing.assert_allclose(dq[rows], data["dq"][rows], rtol=0, atol=5e-7)


def _comparable_rows(name, data, block_m):
    """The original counts padding as keys at pooled levels; the specification does not."""
    rows = np.ones(data["q"].shape[:3], bool)
    if name in ("fwd_legacy_tail300", "bwd_legacy_200"):
        ragged_is_exact = data["levels"][..., -1] <= 1
        rows &= np.repeat(ragged_is_exact, block_m, axis=2)[:, :, : rows.shape[2]]
    return rows


def test_similarity_cap_is_exact():
    recorded, data = load("ksim_128")
    config = PSAConfig(
        block_n=recorded["blocksize"],
        **{f"sim_{n}x_threshold": recorded[f"sim_{n}x_threshold"] for n in (2, 4, 8)},
    )
    np.testing.assert_array_equal(similarity_cap(data["k"], config), data["sim_mask"])


@pytest.mark.parametrize("name", of_kind("importance"))
def test_importance_up_to_the_row_sum(name):
    recorded, data = load(name)
    q, k = (data[x].astype(np.float64) for x in ("sampled_q", "sampled_k"))
    scores = _ratio_to_row_maximum(
        q,
        k,
        np.ones((q.shape[2], k.shape[2]), bool),
        np.arange(q.shape[2]) // recorded["num_keep_m"],
        np.arange(k.shape[2]) // recorded["num_keep_n"],
        PSAConfig(scale=recorded["sm_scale"]),
    )
    expected = data["importance"]
    np.testing.assert_allclose(
        scores / scores.sum(-1, keepdims=True),
        expected / expected.sum(-1, keepdims=True),
        rtol=1e-5,
        atol=5e-6,
    )
