"""Pyramid sparse attention in real decoders with tiny random weights."""

import itertools

import pytest
import torch

transformers = pytest.importorskip("transformers")

from psa_torch import PSAConfig  # noqa: E402
from psa_torch.integrations.transformers import counts, register  # noqa: E402

LEVEL1 = {1: (0.0, 1.0)}
SOME = {1: (0, 0.3), 2: (0.3, 0.5), 8: (0.5, 0.8), 0: (0.8, 1)}
_names = (f"psa-{i}" for i in itertools.count())
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
TEXT = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 64,
    "vocab_size": 99,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 32,
    "out_hidden_size": 64,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
}
TOKENS = {
    "image_token_id": 90,
    "video_token_id": 91,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
}


def named(ratios, **arguments):
    config = PSAConfig(block_m=64, block_n=64, causal=True, mask_ratios=ratios)
    return register(next(_names), config, **{"min_length": 64, **arguments})


def qwen(version):
    """A model and one video prompt for it."""
    frames, height, width = 4, 12, 16
    count = frames * height * width // 4
    if version == "2.5":
        config = transformers.Qwen2_5_VLConfig(
            text_config={**TEXT, "rope_parameters": ROPE},
            vision_config={
                **VISION,
                "patch_size": 14,
                "window_size": 56,
                "fullatt_block_indexes": [1],
            },
            **TOKENS,
        )
        model = transformers.Qwen2_5_VLForConditionalGeneration(config)
        ids, patch = [5, 6, 7, 92] + [91] * count + [93] + list(range(10, 40)), 14
    else:
        moe = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
        kind = "Qwen3VLMoe" if version == "3-moe" else "Qwen3VL"
        config = getattr(transformers, f"{kind}Config")(
            text_config={
                **TEXT,
                "rope_parameters": {**ROPE, "mrope_interleaved": True},
                **(moe if version == "3-moe" else {}),
            },
            vision_config={
                **VISION,
                "patch_size": 16,
                "deepstack_visual_indexes": [0],
                "num_position_embeddings": 64,
            },
            **TOKENS,
        )
        model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
        frame = [8, 92] + [91] * (count // frames) + [93]
        ids, patch = [5, 6, 7] + frame * frames + list(range(10, 40)), 16
    for parameter in model.parameters():
        parameter.data.mul_(4)
    ids = torch.tensor([ids])
    return model.eval(), {
        "input_ids": ids,
        "pixel_values_videos": torch.randn(frames * height * width, 6 * patch**2) * 0.2,
        "video_grid_thw": torch.tensor([[frames, height, width]]),
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == 91).int() * 2,
    }


def logits(model, inputs, implementation):
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        return model(**inputs).logits


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("version", ["2.5", "3", "3-moe"])
def test_language_model_is_sparse_and_level_one_is_the_model(version):
    model, inputs = qwen(version)
    dense = logits(model, inputs, "sdpa")
    level1, some = named(LEVEL1), named(SOME)
    for name in (level1, some):
        out = logits(model, inputs, {"text_config": name, "vision_config": "sdpa"})
        assert counts(name) == {"sparse": 2}
        assert (relative(out, dense) < 1e-5) == (name == level1)
    name = named(LEVEL1)
    assert relative(logits(model, inputs, name), dense) < 1e-5
    assert counts(name)["sparse"] == 2 and counts(name)["not causal"] > 0


def test_generation_decodes_dense_and_padding_is_dense():
    model, inputs = qwen("2.5")
    model.set_attn_implementation("sdpa")
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    name = named(LEVEL1)
    model.set_attn_implementation({"text_config": name, "vision_config": "sdpa"})
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), expected)
    assert counts(name)["sparse"] == 2 and counts(name)["decode"] == 6
    pads = {"input_ids": 2, "attention_mask": 0, "mm_token_type_ids": 0}
    for key, pad in pads.items():  # left padding
        inputs[key] = torch.nn.functional.pad(inputs[key], (9, 0), value=pad)
    name = named(SOME)
    padded = logits(model, inputs, {"text_config": name, "vision_config": "sdpa"})
    assert counts(name) == {"mask": 2}
    assert torch.equal(padded[:, 9:], logits(model, inputs, "sdpa")[:, 9:])


def test_short_prompts_stay_dense_and_bad_names_are_refused():
    model, inputs = qwen("3")
    name = named(SOME, min_length=4096)
    logits(model, inputs, {"text_config": name, "vision_config": "sdpa"})
    assert counts(name) == {"short": 2}
    with pytest.raises(ValueError, match="registered with transformers already"):
        register("sdpa", PSAConfig(causal=True))
    with pytest.raises(ValueError, match="causal=True"):
        register(next(_names), PSAConfig())
    with pytest.raises(ValueError, match="not registered"):
        counts("nobody")
