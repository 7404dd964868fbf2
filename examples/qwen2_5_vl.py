"""Qwen2.5-VL: a long video prompt is read sparse, answers are decoded dense. Tiny random weights.

With real weights only `model` and its inputs change:

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained("Qwen/Qwen2.5-VL-7B-Instruct")
"""

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from psa_torch.integrations.transformers import counts, register

FRAMES, HEIGHT, WIDTH = 4, 12, 16  # patches; the vision tower merges 2 x 2
TOKENS = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92}


def tiny_model() -> Qwen2_5_VLForConditionalGeneration:
    text = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 99,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 32,
        "out_hidden_size": 64,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, vision_end_token_id=93, **TOKENS
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def main() -> None:
    torch.manual_seed(0)
    model = tiny_model()
    video = FRAMES * HEIGHT * WIDTH
    ids = torch.tensor([[5, 6, 7, 92] + [91] * (video // 4) + [93] + list(range(10, 40))])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": torch.randn(video, 6 * 14**2),
        "video_grid_thw": torch.tensor([[FRAMES, HEIGHT, WIDTH]]),
        "mm_token_type_ids": (ids == 91).int() * 2,
    }

    # The two lines. min_length is small here because the prompt is.
    register("psa", preset="qwen2.5-vl", min_length=64)
    model.set_attn_implementation({"text_config": "psa", "vision_config": "sdpa"})

    answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    print(f"{ids.shape[1]} tokens read, {answer.shape[1] - ids.shape[1]} written")
    print(counts("psa"))


if __name__ == "__main__":
    main()
