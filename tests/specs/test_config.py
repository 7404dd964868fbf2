"""PSAConfig: fields, defaults, serial forms and refusals."""

import copy
import dataclasses
import pickle

import pytest

from shared_specs import PSAConfig
from shared_specs.sampling import SamplePlan

OLD = {"attn_impl": "old_mask_type", "block_m": 128, "block_n": 128}
BUDGET = {"importance": "defect", "mask_mode": "budget"}


def test_defaults():
    config = PSAConfig()
    assert (config.block_m, config.block_n, config.tile_n) == (128, 64, 32)
    assert dict(config.mask_ratios) == {
        1: (0.0, 0.1),
        2: (0.1, 0.15),
        4: (0.15, 0.15),
        8: (0.15, 0.35),
        0: (0.35, 1.0),
    }
    assert config.mask_mode == "topk"
    assert config.attn_impl == "new_mask_type"
    assert config.use_sim_mask is False
    assert (config.sim_2x_threshold, config.sim_4x_threshold, config.sim_8x_threshold) == (0, 0, -1)
    assert config.rearrange_method is None and config.causal is False
    assert config.scale is None and config.min_full_ratio == 0.06
    assert (config.importance, config.importance_pool) == ("pooled", 4)
    assert (config.sample_m, config.sample_n, config.sample_seed) == (None, None, 0)
    assert (config.resolved_sample_m, config.resolved_sample_n) == (32, 16)
    assert (config.antidiagonal_stride, config.sink_blocks, config.text_length) == (8, 0, 0)
    assert (config.text_position, config.grid, config.tile_size) == ("end", None, None)


@pytest.mark.parametrize(
    "block_n, tile_n, expected",
    [(64, 32, (1, 1, 2, 4, 1)), (32, 32, (1, 2, 4, 8, 1)), (128, 32, (1, 1, 1, 2, 1))],
)
def test_merge_counts_the_blocks_that_fill_a_tile(block_n, tile_n, expected):
    config = PSAConfig(block_n=block_n, tile_n=tile_n)
    assert tuple(config.merge(level) for level in (1, 2, 4, 8, 0)) == expected


def test_ratio_ends_ignore_the_order_of_the_mapping():
    shuffled = {0: (0.35, 1.0), 8: (0.15, 0.35), 4: (0.15, 0.15), 1: (0.0, 0.1), 2: (0.1, 0.15)}
    assert PSAConfig(mask_ratios=shuffled).ratio_ends == PSAConfig().ratio_ends
    assert PSAConfig().ratio_ends == ((1, 0.1), (2, 0.15), (4, 0.15), (8, 0.35), (0, 1.0))
    assert PSAConfig(mask_ratios=shuffled) == PSAConfig()


def test_what_follows_from_the_fields():
    config = PSAConfig(block_m=64, block_n=128, sample_m=3, sample_seed=7)
    assert config.query_samples == SamplePlan(64, 3, 7)
    assert config.key_samples == SamplePlan(128, 32, 8)
    assert config.resolved_scale(64) == 0.125
    assert PSAConfig(scale=0.0).resolved_scale(64) == 0.0  # given, though it is falsy
    config = PSAConfig(sim_2x_threshold=0.7, sim_4x_threshold=0.65, sim_8x_threshold=0.6)
    assert list(config.similarity_thresholds.items()) == [(2, 0.7), (4, 0.65), (8, 0.6)]


@pytest.mark.parametrize(
    "config",
    [
        PSAConfig(),
        PSAConfig(grid=(4, 6, 8), rearrange_method="STA", tile_size=(2, 2, 2), text_length=7),
        PSAConfig(**OLD, use_sim_mask=True, sim_2x_threshold=0.7, scale=0.25, causal=True),
        PSAConfig(mask_ratios={1: (0, 0.25), 8: (0.25, 0.5)}, mask_mode="thresholdbound"),
        PSAConfig(**BUDGET, budget=0.2, budget_levels=(1, 8), budget_scope="row", sample_m=4),
    ],
)
def test_serial_forms_round_trip(config, tmp_path):
    assert PSAConfig.from_json(config.to_json()) == config
    assert PSAConfig.from_toml(config.to_toml()) == config
    assert PSAConfig.from_dict(config.to_dict()) == config
    for name in ("c.json", "c.toml"):
        config.save(tmp_path / name)
        assert PSAConfig.load(tmp_path / name) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert copy.deepcopy(config) == config
    assert hash(copy.deepcopy(config)) == hash(config)


def test_frozen_and_replaceable():
    config = PSAConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.block_m = 64
    with pytest.raises(TypeError):
        config.mask_ratios[1] = (0, 1)
    assert dataclasses.replace(config, block_m=64).block_m == 64
    with pytest.raises(TypeError):
        PSAConfig(128)


@pytest.mark.parametrize(
    "fields, error, words",
    [
        ({"block_m": 96}, ValueError, ["block_m", "96", "64, 128"]),
        ({"block_n": 16}, ValueError, ["block_n", "16", "32, 64, 128"]),
        ({"block_m": 128.5}, TypeError, ["block_m", "128.5"]),
        ({"tile_n": 48}, ValueError, ["tile_n", "48", "divisor"]),
        ({"tile_n": 4}, ValueError, ["tile_n", "4", "at least 8"]),
        ({"mask_mode": "top"}, ValueError, ["mask_mode", "'top'", "thresholdbound"]),
        ({"attn_impl": "new"}, ValueError, ["attn_impl", "old_mask_type"]),
        ({"attn_impl": "old_mask_type"}, ValueError, ["old_mask_type", "block_n=64", "128"]),
        ({**OLD, "block_m": 64}, ValueError, ["block_m=64", "128"]),
        (
            {"use_sim_mask": True},
            ValueError,
            ["use_sim_mask=False", "old_mask_type", "block_m=128", "block_n=128", "tile_n=32"],
        ),
        ({"use_sim_mask": 1}, TypeError, ["use_sim_mask", "1"]),
        ({"sim_2x_threshold": float("nan")}, ValueError, ["sim_2x_threshold", "nan"]),
        ({"sim_8x_threshold": "0.5"}, TypeError, ["sim_8x_threshold", "0.5"]),
        ({"causal": True, "rearrange_method": "Gilbert"}, ValueError, ["causal", "Gilbert"]),
        ({"rearrange_method": "gilbert"}, ValueError, ["rearrange_method", "Gilbert"]),
        ({"scale": float("inf")}, ValueError, ["scale", "inf"]),
        ({"min_full_ratio": 1.5}, ValueError, ["min_full_ratio", "1.5"]),
        ({"importance": "mean"}, ValueError, ["importance", "pooled"]),
        ({"importance": "defect"}, ValueError, ["need each other", "'topk'", "'defect'"]),
        ({"mask_mode": "budget"}, ValueError, ["need each other", "'budget'", "'pooled'"]),
        ({**BUDGET, "mask_ratios": {1: (0, 1)}}, ValueError, ["mask_ratios", "default", "budget"]),
        ({**BUDGET, **OLD}, ValueError, ["attn_impl", "new_mask_type", "budget"]),
        (
            {**BUDGET, **OLD, "use_sim_mask": True},
            ValueError,
            ["attn_impl", "budget", "use_sim_mask=True"],
        ),
        ({**BUDGET, "sample_m": 5}, ValueError, ["sample_m", "divisor", "128", "5"]),
        ({"budget": 0.0}, ValueError, ["budget", "(0, 1]", "0.0"]),
        ({"budget": 1.5}, ValueError, ["budget", "(0, 1]", "1.5"]),
        ({"budget": True}, TypeError, ["budget", "True"]),
        ({"budget_scope": "batch"}, ValueError, ["budget_scope", "head", "row"]),
        ({"budget_levels": (2, 4)}, ValueError, ["budget_levels", "with 1", "(2, 4)"]),
        ({"budget_levels": (8, 1)}, ValueError, ["budget_levels", "ascending", "(8, 1)"]),
        ({"budget_levels": (1, 1)}, ValueError, ["budget_levels", "(1, 1)"]),
        ({"budget_levels": (1, 3)}, ValueError, ["budget_levels", "(1, 3)"]),
        ({"budget_levels": 1}, TypeError, ["budget_levels", "1"]),
        ({"importance_pool": 3}, ValueError, ["importance_pool", "3"]),
        ({"sample_m": 129}, ValueError, ["sample_m", "129", "128"]),
        ({"sample_n": 0}, ValueError, ["sample_n", "0"]),
        ({"sample_seed": -1}, ValueError, ["sample_seed", "-1"]),
        ({"antidiagonal_stride": 7}, ValueError, ["antidiagonal_stride", "7"]),
        ({"sink_blocks": -1}, ValueError, ["sink_blocks", "-1"]),
        ({"text_length": True}, TypeError, ["text_length", "True"]),
        ({"text_position": "middle"}, ValueError, ["text_position", "middle"]),
        ({"grid": (2, 3)}, ValueError, ["grid", "(2, 3)"]),
        ({"grid": (2, 0, 3)}, ValueError, ["grid", "(2, 0, 3)"]),
        ({"grid": (2, 4.0, 3)}, ValueError, ["grid", "(2, 4.0, 3)"]),
        ({"tile_size": "abc"}, ValueError, ["tile_size", "abc"]),
        ({"mask_ratios": {}}, TypeError, ["mask_ratios"]),
        ({"mask_ratios": {3: (0, 1)}}, ValueError, ["3", "0, 1, 2, 4, 8"]),
        ({"mask_ratios": {1: (0, 0.5), 2: (0.4, 1)}}, ValueError, ["mask_ratios[2]", "0.5"]),
        ({"mask_ratios": {1: (0.1, 0.5)}}, ValueError, ["mask_ratios[1]", "0.0"]),
        ({"mask_ratios": {1: (0, 1.5)}}, ValueError, ["mask_ratios[1]", "1.5"]),
        ({"mask_ratios": {1: (0, float("nan"))}}, ValueError, ["mask_ratios[1]", "nan"]),
        ({"mask_ratios": {1: 0.5}}, TypeError, ["mask_ratios[1]", "0.5"]),
        ({"mask_ratios": {1: (0, 0.5), "1": (0, 0.5)}}, ValueError, ["twice"]),
    ],
)
def test_refusals_name_the_field_and_what_is_accepted(fields, error, words):
    with pytest.raises(error) as caught:
        PSAConfig(**fields)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "read, text",
    [
        (PSAConfig.from_json, '{"block_q": 64}'),
        (PSAConfig.from_toml, "block_q = 64"),
        (PSAConfig.from_json, '{"block_m": 64, "block_m": 128}'),
        (PSAConfig.from_json, "{"),
        (PSAConfig.from_json, b"\xff\xfe\x00"),
        (PSAConfig.from_json, "[" * 100_000),
        (PSAConfig.from_toml, "block_m = "),
        (PSAConfig.from_json, '{"scale": NaN}'),
    ],
)
def test_bad_documents_are_value_errors(read, text):
    with pytest.raises(ValueError):
        read(text)


def test_a_document_that_is_not_a_mapping():
    with pytest.raises(TypeError, match="mapping"):
        PSAConfig.from_json("[1, 2]")


def test_unknown_file_type(tmp_path):
    with pytest.raises(ValueError, match=r"\.json or \.toml"):
        PSAConfig().save(tmp_path / "config.yaml")
