"""Pyramid sparse attention in transformers' decoders: sparse prefill, dense everything else."""

from __future__ import annotations

from collections import Counter

from torch import Tensor, nn

from psa_torch._types import Overrides
from psa_torch.attention import IMPLEMENTATIONS
from psa_torch.functional import psa_attention
from psa_torch.integrations.settings import config_and_warmup
from shared_specs import checks
from shared_specs.config import PSAConfig

__all__ = ["counts", "register"]

_COUNTS: dict[str, Counter[str]] = {}


def register(
    name: str,
    config: PSAConfig | None = None,
    *,
    preset: str | None = None,
    min_length: int = 2048,
    implementation: str | None = None,
) -> str:
    """Register an attention and its mask function with transformers, for the whole process.

    Then `model.set_attn_implementation({"text_config": name, "vision_config": "sdpa"})`. Sparse is
    causal attention over at least `min_length` tokens without a cache before them, without padding,
    dropout, sliding window or sinks; everything else is transformers' own SDPA attention, and
    counted: see `counts`.

    Args:
        name: a name that transformers does not know yet.
        config: causal and without a token order; exactly one of config and preset.
        preset: one of `shared_specs.presets.names()`.
        min_length: shortest prompt that is sparse, in tokens.
        implementation: of the sparse calls, as in `psa_attention`.

    Returns:
        name.

    Raises:
        TypeError: an argument has a type that is not accepted.
        ValueError: the name is taken, or the configuration is not causal.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {type(name).__name__}")
    config, _ = config_and_warmup(preset, config)
    if not config.causal:
        raise ValueError("config must have causal=True: a decoder attends to the past")
    checks.check_integer("min_length", min_length)
    checks.check_implementation(implementation, IMPLEMENTATIONS)
    if name in AttentionInterface().valid_keys() or name in AttentionMaskInterface().valid_keys():
        raise ValueError(f"name {name!r} is registered with transformers already: take another")
    done = _COUNTS[name] = Counter()

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **kwargs
    ) -> tuple[Tensor, Tensor | None]:
        reason = _why_dense(module, query, key, attention_mask, kwargs, min_length)
        done[reason or "sparse"] += 1
        if reason:
            return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        scaling = kwargs.get("scaling")
        overrides: Overrides = {} if scaling is None else {"scale": float(scaling)}
        out = psa_attention(
            query, key, value, config=config, implementation=implementation, **overrides
        )
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


def counts(name: str) -> dict[str, int]:
    """Calls under a registered name: 'sparse', or the reason why they were dense."""
    if name not in _COUNTS:
        raise ValueError(f"name {name!r} was not registered; registered: {sorted(_COUNTS)}")
    return dict(_COUNTS[name])


def _why_dense(module, query, key, mask, kwargs, min_length) -> str | None:
    causal = kwargs.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)
    if not causal:
        return "not causal"
    if query.shape[2] != key.shape[2]:
        return "decode"
    if mask is not None:
        return "mask"
    if query.shape[2] < min_length:
        return "short"
    for option in ("dropout", "sliding_window", "s_aux", "softcap", "position_bias"):
        value = kwargs.get(option)
        if value is not None and not (option == "dropout" and value == 0):
            return option
    return None
