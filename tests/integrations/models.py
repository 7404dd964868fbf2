"""Tiny random models of the real classes, and one forward of each."""

import torch

from psa_torch import PSAConfig

LEVEL1 = PSAConfig(block_m=64, block_n=64, mask_ratios={1: (0.0, 1.0)}, rearrange_method="Gilbert")
SPARSE = PSAConfig(
    block_m=64,
    block_n=64,
    mask_ratios={1: (0, 0.2), 2: (0.2, 0.4), 8: (0.4, 0.7), 0: (0.7, 1)},
    rearrange_method="Gilbert",
)
WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 32,
}
COG = {
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 16,
    "num_layers": 2,
    "sample_width": 24,
    "sample_height": 16,
    "sample_frames": 17,
    "patch_size": 2,
    "temporal_compression_ratio": 4,
    "max_text_seq_length": 10,
    "use_rotary_positional_embeddings": True,
}
HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_refiner_layers": 1,
    "patch_size_t": 1,
    "text_embed_dim": 16,
    "rope_axes_dim": (2, 6, 8),
}


def perturbed(model):
    """Evaluation mode, and no parameter left at a value that hides a mistake, such as zero."""
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape) * 0.05)
    return model.eval()


def video(batch=2, frames=5, height=16, width=24, channels=4):
    return torch.randn(batch, channels, frames, height, width)


def times(batch=2):
    return torch.full((batch,), 500)


def build(name):
    """The model and the arguments of one forward, fresh and random."""
    import diffusers
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    text = torch.randn(2, 12, 16)
    if name == "wan":
        arguments = (video(), times(), text)
        return perturbed(diffusers.WanTransformer3DModel(**WAN)), arguments, {}
    if name == "wan-i2v":
        model = diffusers.WanTransformer3DModel(**WAN, image_dim=16, added_kv_proj_dim=64)
        arguments = (video(), times(), torch.randn(2, 512, 16))
        return perturbed(model), arguments, {"encoder_hidden_states_image": torch.randn(2, 9, 16)}
    if name == "wan-ti2v":
        model = perturbed(diffusers.WanTransformer3DModel(**WAN))
        return model, (video(), torch.rand(2, 5 * 8 * 12) * 999, text), {}
    if name == "wan-vace":
        model = diffusers.WanVACETransformer3DModel(**WAN, vace_layers=[0], vace_in_channels=8)
        control = {"control_hidden_states": video(channels=8)}
        return perturbed(model), (video(), times(), text), control
    if name == "skyreels-v2":
        model = perturbed(diffusers.SkyReelsV2Transformer3DModel(**WAN))
        return model, (video(), times(), text), {}
    if name in ("cogvideox", "cogvideox-fused"):
        model = perturbed(diffusers.CogVideoXTransformer3DModel(**COG))
        if name.endswith("fused"):
            model.fuse_qkv_projections()
        rope = get_3d_rotary_pos_embed(64, ((0, 0), (8, 12)), (8, 12), 5)
        x = video().transpose(1, 2)
        return model, (x, text[:, :10], times()), {"image_rotary_emb": rope}
    if name == "cogvideox1.5":
        model = diffusers.CogVideoXTransformer3DModel(**COG, patch_size_t=2, patch_bias=False)
        rope = get_3d_rotary_pos_embed(64, None, (8, 12), 3, grid_type="slice", max_size=(8, 12))
        x = video(frames=6).transpose(1, 2)
        return perturbed(model), (x, text[:, :10], times()), {"image_rotary_emb": rope}
    mask = torch.arange(12)[None] < torch.tensor([[9], [9]])
    if name.startswith("hunyuanvideo") and "1.5" not in name:
        model = diffusers.HunyuanVideoTransformer3DModel(
            **HUNYUAN,
            patch_size=2,
            num_layers=1,
            num_single_layers=1,
            guidance_embeds=True,
            pooled_projection_dim=8,
        )
        if name.endswith("ragged"):
            mask = torch.arange(12)[None] < torch.tensor([[9], [4]])
        guidance = torch.tensor([6.0, 6.0])
        arguments = (video(), times(), text, mask, torch.randn(2, 8), guidance)
        return perturbed(model), arguments, {}
    if name == "hunyuanvideo1.5":
        model = diffusers.HunyuanVideo15Transformer3DModel(
            **HUNYUAN,
            patch_size=1,
            num_layers=2,
            text_embed_2_dim=16,
            image_embed_dim=16,
            target_size=64,
        )
        keywords = {
            "hidden_states": video(height=8, width=12),
            "timestep": times().float(),
            "encoder_hidden_states": text,
            "encoder_attention_mask": mask.float(),
            "encoder_hidden_states_2": torch.randn(2, 6, 16),
            "encoder_attention_mask_2": (torch.arange(6) < 4).float().expand(2, 6),
            "image_embeds": torch.zeros(2, 5, 16),
        }
        return perturbed(model), (), keywords
    if name == "ltx":
        model = diffusers.LTXVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=32,
            cross_attention_dim=64,
            num_layers=2,
            caption_channels=16,
        )
        arguments = (torch.randn(2, 480, 4), text, times(), torch.ones(2, 12))
        return perturbed(model), arguments, {"num_frames": 5, "height": 8, "width": 12}
    if name == "mochi":
        model = diffusers.MochiTransformer3DModel(
            patch_size=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            pooled_projection_dim=16,
            in_channels=4,
            out_channels=None,
            text_embed_dim=16,
            time_embed_dim=8,
            activation_fn="swiglu",
            max_sequence_length=16,
        )
        mask = torch.arange(12)[None] < torch.tensor([[9], [5]])
        return perturbed(model), (video(), text, times(), mask), {}
    raise KeyError(name)


NAMES = (
    "wan",
    "wan-i2v",
    "wan-ti2v",
    "wan-vace",
    "skyreels-v2",
    "cogvideox",
    "cogvideox-fused",
    "cogvideox1.5",
    "hunyuanvideo",
    "hunyuanvideo-ragged",
    "hunyuanvideo1.5",
    "ltx",
    "mochi",
)
