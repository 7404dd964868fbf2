"""Wan with PSA in its self-attention, on tiny random weights: nothing is downloaded.

With real weights only `pipe` changes:

    pipe = diffusers.WanPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers").to("cuda")
"""

import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

from psa_torch.integrations.diffusers import apply


def tiny_pipeline() -> WanPipeline:
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=64,
        num_layers=2,
        rope_max_seq_len=32,
    )
    scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    return WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=transformer
    )


def main() -> None:
    torch.manual_seed(0)
    pipe = tiny_pipeline()
    prompt = {name: torch.randn(1, 8, 16) for name in ("prompt_embeds", "negative_prompt_embeds")}
    size = {"height": 128, "width": 192, "num_frames": 17}

    # The two lines. The first two steps stay dense; the preset's own count is for 50 steps.
    psa = apply(pipe, "wan2.1-1.3b-topk", warmup_steps=2, record=True)
    video = pipe(**prompt, **size, num_inference_steps=6, output_type="latent").frames

    print("latents", tuple(video.shape))
    print(psa.table())
    densities = [record.density for record in psa.records.read()]
    print(f"density of the sparse calls: {sum(densities) / len(densities):.1%}")
    psa.remove()


if __name__ == "__main__":
    main()
