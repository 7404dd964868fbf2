"""CogVideoX with PSA over text and video, on tiny random weights: nothing is downloaded.

With real weights only `pipe` changes:

    pipe = diffusers.CogVideoXPipeline.from_pretrained("THUDM/CogVideoX1.5-5B").to("cuda")
"""

import torch
from diffusers import CogVideoXDPMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel

from psa_torch import PSAConfig
from psa_torch.integrations.diffusers import apply


def tiny_pipeline() -> CogVideoXPipeline:
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=64,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=2,
        sample_width=24,
        sample_height=16,
        sample_frames=17,
        max_text_seq_length=8,
        use_rotary_positional_embeddings=True,
    )
    scheduler = CogVideoXDPMScheduler(prediction_type="v_prediction", snr_shift_scale=1.0)
    return CogVideoXPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=scheduler
    )


def main() -> None:
    torch.manual_seed(0)
    pipe = tiny_pipeline()
    prompt = {name: torch.randn(1, 8, 16) for name in ("prompt_embeds", "negative_prompt_embeds")}

    def frames():
        return pipe(
            **prompt,
            height=128,
            width=192,
            num_frames=17,
            num_inference_steps=4,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).frames

    dense = frames()
    # Half of the key blocks at level 1, the others pooled by 4; then the model as it was.
    config = PSAConfig(mask_ratios={1: (0, 0.5), 4: (0.5, 1)}, rearrange_method="Gilbert")
    with apply(pipe, config=config) as psa:
        sparse = frames()
        print(psa.table())
    error = (sparse - dense).norm() / dense.norm()
    print(f"difference to dense: {error:.2%}; removed: {torch.equal(frames(), dense)}")


if __name__ == "__main__":
    main()
