"""The published configurations, and the grids they give videos."""

import pytest

from shared_specs import PSAConfig, presets

OLD, NEW = "old_mask_type", "new_mask_type"
PUBLISHED = {
    # name: mode, form, blocks, ends of 1 2 4 8, warm-up, divisors, text, order
    "wan2.1-14b": ("thresholdbound", NEW, (128, 128), (0.4, 0.5, 0.6, 0.8), 15, (16, 16, 4)),
    "wan2.1-1.3b": ("thresholdbound", OLD, (128, 128), (0.5, 0.6, 0.7, 0.8), 15, (16, 16, 4)),
    "wan2.1-1.3b-topk": ("topk", NEW, (128, 32), (0.05, 0.1, 0.15, 0.25), 15, (16, 16, 4)),
    "wan2.2-a14b": ("thresholdbound", NEW, (128, 32), (0.5, 0.6, 0.6, 0.8), 12, (16, 16, 4)),
    "wan2.2-5b": ("thresholdbound", NEW, (128, 32), (0.6, 0.7, 0.7, 0.8), 15, (32, 32, 4)),
    "cogvideox1.5-5b": ("topk", NEW, (128, 32), (0.1, 0.15, 0.15, 0.35), 15, (16, 16, 8)),
    "cogvideox-5b": ("topk", NEW, (128, 128), (0.1, 0.15, 0.15, 0.35), 15, (16, 16, 4)),
    "cogvideox-5b-4step": ("topk", OLD, (128, 128), (0.05, 0.15, 0.25, 0.5), 0, (16, 16, 4)),
    "qwen2.5-vl": ("thresholdbound", OLD, (128, 128), (0.7, 0.8, 0.9, 0.9), 0, None),
}
NO_ORDER = ("cogvideox-5b", "cogvideox-5b-4step", "qwen2.5-vl")
TEXT = {name: (226, "start") for name in PUBLISHED if name.startswith("cogvideox")}
TEXT["qwen2.5-vl"] = (512, "end")
SIMILARITY = {"wan2.1-1.3b": (0.7, 0.65, 0.6), "qwen2.5-vl": (0.75, 0.7, 0.7)}


def test_all_are_listed():
    assert presets.names() == tuple(sorted([*PUBLISHED, "accurate"]))


def test_the_accurate_one_is_not_published_but_ours():
    preset = presets.load("accurate")
    config = PSAConfig.preset("accurate", video_size=(1280, 768, 69))
    assert config.grid == (18, 48, 80)
    assert (config.importance, config.mask_mode, config.budget) == ("defect", "budget", 0.15)
    assert (config.rest, config.rearrange_method) == ("mean", "Clusters")
    assert (preset.warmup_steps, preset.config.grid) == (15, None)


@pytest.mark.parametrize("name", PUBLISHED)
def test_values_are_the_published_ones(name):
    mode, form, blocks, ends, warmup, divisors = PUBLISHED[name]
    preset = presets.load(name)
    config = preset.config
    assert (config.mask_mode, config.attn_impl) == (mode, form)
    assert (config.block_m, config.block_n) == blocks
    assert tuple(config.mask_ratios[level][1] for level in (1, 2, 4, 8)) == ends
    assert config.mask_ratios[0] == (ends[-1], 1.0)
    assert preset.warmup_steps == warmup
    found = preset.divisors
    assert divisors == (found and (found.width, found.height, found.frames))
    assert config.rearrange_method == (None if name in NO_ORDER else "Gilbert")
    assert (config.text_length, config.text_position) == TEXT.get(name, (0, "end"))
    thresholds = (config.sim_2x_threshold, config.sim_4x_threshold, config.sim_8x_threshold)
    assert config.use_sim_mask == (name in SIMILARITY)
    assert thresholds == SIMILARITY.get(name, (0.0, 0.0, -1.0))
    qwen = name == "qwen2.5-vl"
    assert config.causal == qwen and config.sink_blocks == int(qwen)
    assert config.importance == ("antidiagonal" if qwen else "pooled")
    assert config.antidiagonal_stride == 8
    assert config.grid is None and preset.description


def test_a_video_size_gives_a_grid_rounded_up():
    config = PSAConfig.preset("wan2.1-14b", video_size=(1280, 768, 69))
    assert config.grid == (18, 48, 80)
    assert PSAConfig.preset("wan2.2-5b", video_size=(1281, 704, 121)).grid == (31, 22, 41)
    assert PSAConfig.preset("cogvideox1.5-5b", video_size=(1360, 768, 81)).grid == (11, 48, 85)
    assert PSAConfig.preset("wan2.1-14b", (1, 1, 1)).grid == (1, 1, 1)
    assert PSAConfig.preset("wan2.1-14b").grid is None


def test_bad_names_and_sizes_are_refused():
    with pytest.raises(ValueError, match="preset must be one of .*wan2.1-14b.*; got 'wan'"):
        PSAConfig.preset("wan")
    for size in ((1280, 768), (1280, 768, 0), (1280.0, 768, 69), "720p"):
        with pytest.raises(ValueError, match="video_size must be .*width, height, frames.* got"):
            PSAConfig.preset("wan2.1-14b", video_size=size)
    with pytest.raises(ValueError, match="'qwen2.5-vl' has no video grid"):
        PSAConfig.preset("qwen2.5-vl", video_size=(1280, 768, 69))


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_survive_json_and_toml(name):
    config = PSAConfig.preset(name)
    assert PSAConfig.from_json(config.to_json()) == config
    assert PSAConfig.from_toml(config.to_toml()) == config
