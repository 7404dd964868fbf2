"""Plain torch between q, k, v and the levels never reads a value back to the host.

Meta tensors have no values, so any such read raises.
"""

import pytest
import torch

from psa_torch import importance, masks, pyramid, selection, similarity, table
from shared_specs import PSAConfig


def body(operator):
    """What the operator runs, past the fake that meta tensors would otherwise reach."""
    return operator._init_fn


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def test_the_check_itself():
    with pytest.raises(RuntimeError):
        bool(meta(3).sum() > 0)


def test_pyramid_and_similarity():
    k = meta(1, 2, 500, 32)
    rows, _ = body(pyramid._build_pyramid)(k, k, 64)
    assert rows.shape == (1, 2, 2 * 512 - 512 // 8, 32)
    old = PSAConfig(attn_impl="old_mask_type", block_n=128, use_sim_mask=True)
    assert body(similarity._similarity_cap)(k, old.to_json()).shape == (1, 2, 4)


@pytest.mark.parametrize("estimator", ["pooled", "sampled", "antidiagonal"])
def test_scores(estimator):
    config = PSAConfig(importance=estimator, causal=True)
    q, k = meta(1, 4, 300, 32), meta(1, 2, 500, 32)
    assert body(importance._block_scores)(q, k, config.to_json()).shape == (1, 4, 3, 8)


@pytest.mark.parametrize("mode", ["topk", "thresholdbound"])
def test_selection(mode):
    config = PSAConfig(mask_mode=mode, causal=True, text_length=70, sink_blocks=1)
    levels = body(selection._select_levels)(meta(1, 4, 3, 8), None, 300, 500, config.to_json())
    assert levels.shape == (1, 4, 3, 8) and levels.dtype == torch.int32


@pytest.mark.parametrize("scope", ["head", "row"])
def test_budget(scope):
    budget = {"importance": "defect", "mask_mode": "budget", "budget_scope": scope}
    config = PSAConfig(**budget, causal=True, text_length=70, sink_blocks=1)
    q, k = meta(1, 4, 300, 32), meta(1, 2, 500, 32)
    defects = body(importance._block_scores)(q, k, config.to_json())
    assert defects.shape == (1, 4, 3, 8, 4)
    levels = body(selection._select_levels)(defects, None, 300, 500, config.to_json())
    assert levels.shape == (1, 4, 3, 8) and levels.dtype == torch.int32


def test_masks_and_table():
    levels = meta(1, 4, 3, 8, dtype=torch.int32)
    segments = body(masks._to_segments)(levels, meta(1, 4, 3, 8))
    assert body(masks._from_segments)(segments).shape == levels.shape
    for transposed in (False, True):
        entries, counts = body(table._build_table)(levels, transposed)
        assert entries.is_contiguous() and counts.is_contiguous()
