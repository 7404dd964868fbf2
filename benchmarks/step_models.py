"""Video transformers at their published sizes, with random weights, for `model_step`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

FLOAT32 = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")
"""Parameters that diffusers keeps in float32 when it loads a Wan model."""


@dataclasses.dataclass(frozen=True)
class Geometry:
    """A transformer and the latents of one video.

    Attributes:
        kind: 'wan' or 'cogvideox'.
        heads, head_dim, layers: of the transformer.
        latents: (frames, height, width); a token is one frame of 2 x 2.
        feed_forward: width of the hidden layer; CogVideoX has four times that of the tokens.
        text: tokens of the prompt.
    """

    kind: str
    heads: int
    head_dim: int
    layers: int
    latents: tuple[int, int, int]
    feed_forward: int = 0
    text: int = 512

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens (frames, height, width)."""
        frames, height, width = self.latents
        return frames, height // 2, width // 2

    @property
    def tokens(self) -> int:
        """Of the video and of the text that is attended over with it."""
        return math.prod(self.grid) + (self.text if self.kind == "cogvideox" else 0)


MODELS = {
    "wan2.1-1.3b-480p-81f": Geometry("wan", 12, 128, 30, (21, 60, 104), 8960),
    "wan2.1-14b-480p-81f": Geometry("wan", 40, 128, 40, (21, 60, 104), 13824),
    "wan2.1-14b-720p-81f": Geometry("wan", 40, 128, 40, (21, 90, 160), 13824),
    "cogvideox-5b-480p-49f": Geometry("cogvideox", 48, 64, 42, (13, 60, 90), text=226),
    "tiny-wan": Geometry("wan", 2, 32, 2, (3, 16, 24), 64, text=7),
    "tiny-cogvideox": Geometry("cogvideox", 2, 32, 2, (3, 16, 24), text=7),
}


def make(geometry: Geometry) -> nn.Module:
    """The transformer, on the present device, as diffusers initialises it."""
    import diffusers

    common = {
        "num_attention_heads": geometry.heads,
        "attention_head_dim": geometry.head_dim,
        "num_layers": geometry.layers,
        "in_channels": 16,
        "out_channels": 16,
    }
    if geometry.kind == "cogvideox":
        return diffusers.CogVideoXTransformer3DModel(
            **common,
            max_text_seq_length=geometry.text,
            use_rotary_positional_embeddings=True,
        )
    return diffusers.WanTransformer3DModel(
        **common,
        ffn_dim=geometry.feed_forward,
        text_dim=4096,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )


def build(geometry: Geometry, device: str, dtype: torch.dtype) -> nn.Module:
    """The transformer with random weights on `device`, in the dtypes that it is used in."""
    with torch.device("meta"):
        model = make(geometry)
    kept = FLOAT32 if geometry.kind == "wan" else ()
    for name, parameter in model.named_parameters():
        is_kept = any(part in name for part in kept)
        parameter.data = parameter.data.to(torch.float32 if is_kept else dtype)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.zero_()  # one would hide what little an even attention gives
        elif "norm" in name and parameter.ndim == 1:
            parameter.data.fill_(1.0)
        else:
            parameter.data.normal_(0.0, 0.02, generator=generator)
    if geometry.kind == "wan":
        # Rotary tables are computed, not filled: what `meta` made of them has no values.
        model.rope = type(model.rope)(geometry.head_dim, (1, 2, 2), 1024).to(device)
    return model.eval().requires_grad_(False)


def inputs(geometry: Geometry, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of a step: latents, timestep and prompt of one video."""
    generator = torch.Generator(device).manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator).to(dtype)

    frames, height, width = geometry.latents
    arguments = {
        "timestep": torch.full((1,), 500, device=device),
        "encoder_hidden_states": noise(1, geometry.text, 4096),
        "return_dict": False,
    }
    if geometry.kind == "wan":
        return {"hidden_states": noise(1, 16, frames, height, width), **arguments}
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    size = geometry.grid[1:]
    tables = get_3d_rotary_pos_embed(geometry.head_dim, ((0, 0), size), size, frames, device=device)
    latents = noise(1, frames, 16, height, width)
    return {"hidden_states": latents, "image_rotary_emb": tables, **arguments}


def first_attention(model: nn.Module) -> nn.Module:
    """The self-attention of the first block."""
    return next(module for name, module in model.named_modules() if name.endswith("attn1"))
