"""What `psa_torch.integrations.diffusers` must know of a model class, as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from psa_torch.integrations.ordering import (
    Route,
    frames_of_patches,
    patches,
    per_token_times,
    text_then_video,
    tokens,
)
from shared_specs.geometry import cdiv

Arguments = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Family:
    """Where a video transformer attends over its video, and how its tokens lie.

    Attributes:
        classes: names of the transformer classes.
        sparse: whether the attention module of this name (`named_modules`) attends over the video.
        grid: from the model and its forward's arguments by name: tokens (frames, height, width).
        text: likewise the number of text tokens joined to the video; None: what a mask leaves, so
            it is only known at the call.
        text_position: 'start' or 'end', where the joined text lies.
        route: where tokens enter and leave a token order once a forward; None: they are moved
            inside each attention.
        dense: in words, which attention of the model stays dense.
        presets: names of the configurations published for models of this family.
    """

    classes: tuple[str, ...]
    sparse: Callable[[str], bool]
    grid: Callable[[nn.Module, Arguments], tuple[int, int, int]]
    text: Callable[[nn.Module, Arguments], int | None] = lambda model, arguments: 0
    text_position: str = "end"
    route: Route | None = None
    dense: str = ""
    presets: tuple[str, ...] = ()

    @property
    def joins_text(self) -> bool:
        """Whether text is attended over together with the video."""
        return self.text is not Family.text

    @property
    def cuts_masks(self) -> bool:
        """Whether only a mask tells how much text a call attends over."""
        return self.text is _of_mask


def _patches(model: Any, arguments: Arguments) -> tuple[int, int, int]:
    """Grid of `hidden_states [B, C, T, H, W]` under the patch size of the configuration."""
    size = model.config.patch_size
    if isinstance(size, int):
        size = (getattr(model.config, "patch_size_t", None) or 1, size, size)
    (frames, height, width), (t, h, w) = arguments["hidden_states"].shape[2:], size
    return frames // t, height // h, width // w


def _cogvideox_grid(model: Any, arguments: Arguments) -> tuple[int, int, int]:
    frames, _, height, width = arguments["hidden_states"].shape[1:]
    patch, patch_t = model.config.patch_size, model.config.patch_size_t or 1
    return cdiv(frames, patch_t), height // patch, width // patch


def _ltx_grid(model: nn.Module, arguments: Arguments) -> tuple[int, int, int]:
    return arguments["num_frames"], arguments["height"], arguments["width"]


def _prompt(model: nn.Module, arguments: Arguments) -> int:
    return arguments["encoder_hidden_states"].shape[1]


def _of_mask(model: nn.Module, arguments: Arguments) -> None:
    return None


def _starts(*prefixes: str) -> Callable[[str], bool]:
    return lambda name: name.startswith(prefixes)


def _named_attn1(name: str) -> bool:
    return name.endswith("attn1")


def _other_control(model: nn.Module, arguments: Arguments) -> str | None:
    control = arguments.get("control_hidden_states")
    if control is not None and control.shape[2:] != arguments["hidden_states"].shape[2:]:
        return "control and video differ in size"
    return None


def _first_frame_apart(model: nn.Module, arguments: Arguments) -> str | None:
    if getattr(model.config, "image_condition_type", None) == "token_replace":
        return "the tokens of the first frame are treated apart"
    return None


def _forced_diffusion(model: Any, arguments: Arguments) -> str | None:
    if arguments.get("enable_diffusion_forcing") or model.config.num_frame_per_block > 1:
        return "frames have timesteps of their own, or see earlier frames only"
    return None


_ROTARY = {"rope": tokens(1)}
_WAN = {**_ROTARY, "patch_embedding": patches}
_TIMES = {"timestep": per_token_times}
_EMBEDDED = {"rope": tokens(0), "x_embedder": tokens(1)}

FAMILIES = {
    "wan": Family(
        ("WanTransformer3DModel",),
        _named_attn1,
        _patches,
        route=Route(_WAN, _TIMES),
        dense="attention to text and image",
        presets=("wan2.1-14b", "wan2.1-1.3b", "wan2.1-1.3b-topk", "wan2.2-a14b", "wan2.2-5b"),
    ),
    "wan-vace": Family(
        ("WanVACETransformer3DModel",),
        _named_attn1,
        _patches,
        route=Route({**_WAN, "vace_patch_embedding": patches}, refuses=_other_control),
        dense="attention to text and image",
    ),
    "skyreels-v2": Family(
        ("SkyReelsV2Transformer3DModel",),
        _named_attn1,
        _patches,
        route=Route(_WAN, refuses=_forced_diffusion),
        dense="attention to text and image; all of it where frames see earlier frames only",
    ),
    "cogvideox": Family(
        ("CogVideoXTransformer3DModel",),
        _named_attn1,
        _cogvideox_grid,
        _prompt,
        "start",
        Route({"patch_embed": text_then_video}, {"image_rotary_emb": tokens(0)}),
        dense="nothing",
        presets=("cogvideox-5b", "cogvideox-5b-4step", "cogvideox1.5-5b"),
    ),
    "hunyuanvideo": Family(
        ("HunyuanVideoTransformer3DModel",),
        _starts("transformer_blocks.", "single_transformer_blocks."),
        _patches,
        _of_mask,
        route=Route(_EMBEDDED, refuses=_first_frame_apart),
        dense="text refiner, rows of padding",
    ),
    "hunyuanvideo1.5": Family(
        ("HunyuanVideo15Transformer3DModel",),
        _starts("transformer_blocks."),
        _patches,
        _of_mask,
        route=Route(_EMBEDDED),
        dense="text refiner, rows of padding",
    ),
    "ltx": Family(
        ("LTXVideoTransformer3DModel",),
        _named_attn1,
        _ltx_grid,
        route=Route({**_ROTARY, "proj_in": tokens(1)}, _TIMES),
        dense="attention to text",
    ),
    "mochi": Family(
        ("MochiTransformer3DModel",),
        _starts("transformer_blocks."),
        _patches,
        _of_mask,
        route=Route({"rope": tokens(0), "patch_embed": frames_of_patches}),
        dense="pooling of the text",
    ),
}


def family_of(model: nn.Module, family: Family | str | None) -> Family:
    """The family named or given, or the one that lists the class of `model`.

    Raises:
        TypeError: `family` is something else.
        ValueError: no family has this name, or lists this class.
    """
    known = ", ".join(f"{key!r} ({', '.join(f.classes)})" for key, f in FAMILIES.items())
    if isinstance(family, Family):
        return family
    if isinstance(family, str):
        if family not in FAMILIES:
            raise ValueError(f"family must be one of {known}, or a Family; got {family!r}")
        return FAMILIES[family]
    if family is not None:
        raise TypeError(f"family must be a Family, a name or None, got {type(family).__name__}")
    for found in FAMILIES.values():
        if type(model).__name__ in found.classes:
            return found
    raise ValueError(
        f"no family lists {type(model).__name__}; known: {known}. "
        "Describe another with family=Family(classes, sparse, grid, text, text_position, route)"
    )
