"""A model's own attention processor, with PSA in place of scaled_dot_product_attention."""

from __future__ import annotations

import copy
import functools
import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from psa_torch._video_memory import is_recomputation
from psa_torch.functional import psa_attention
from psa_torch.masks import from_segments
from psa_torch.video import PSAVideoAttention, head_density
from shared_specs.config import PSAConfig

_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class Layer:
    """One attention of a model: how it is to attend now, and what it did.

    Attributes:
        name: of the attention module.
        dense: the original call is made with the original arguments.
        config: of this forward; None where only the call tells the text length.
        densities: of this forward, where they are recorded and nothing is kept from step to step.
        video: attention that keeps order and levels for some steps; None: every call chooses.
        calls: how often it ran, by what was done: 'sparse', or why dense. Compiled calls are not
            counted: a counter in the traced region would make a graph a call; nor are those that a
            checkpoint runs again.
    """

    def __init__(self, name: str, owner: Any) -> None:
        self.name = name
        self.owner = owner
        self.dense = False
        self.always_dense = False
        self.config: PSAConfig | None = None
        self.calls: Counter[str] = Counter()
        self.densities: list[Tensor] = []
        self.video: PSAVideoAttention | None = None

    def count(self, what: str) -> None:
        if not (torch.compiler.is_compiling() or is_recomputation()):
            self.calls[what] += 1

    def attend(self, args: tuple, kwargs: dict) -> Tensor:
        """What takes the place of `scaled_dot_product_attention(*args, **kwargs)`."""
        call = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
        if call.get("attn_mask") is not None or call.get("is_causal"):
            self.owner.check_places(self.name, call)
        if self.dense:
            self.count("dense layer" if self.always_dense else "dense step")
            return functional.scaled_dot_product_attention(*args, **kwargs)
        return self._sparse(args, kwargs, *args, **kwargs)

    def _sparse(
        self,
        args,
        kwargs,
        query,
        key,
        value,
        attn_mask=None,
        dropout_p=0.0,
        is_causal=False,
        scale=None,
        enable_gqa=False,
    ) -> Tensor:
        reason = None
        if dropout_p:
            reason = "dropout"
        elif is_causal:
            reason = "causal"
        elif query.shape[2] != key.shape[2]:
            reason = "cross-attention"
        elif attn_mask is not None and attn_mask.dtype != torch.bool:
            reason = "additive mask"
        if reason is None and attn_mask is not None:
            if self.video is not None:
                raise RuntimeError(f"{self.name}: refresh_every and a mask do not go together")
            lengths = self.owner.valid_lengths(attn_mask, query.shape[0], key.shape[2])
            if lengths is None:
                reason = "mask is not a prefix of the keys"
            else:
                return self._cut(query, key, value, lengths, scale)
        if reason is not None:
            return self._fall_back(reason, args, kwargs)
        return self._psa(query, key, value, scale)

    def _fall_back(self, reason: str, args: tuple, kwargs: dict) -> Tensor:
        self.count(reason)
        self.owner.warn(self.name, reason)
        return functional.scaled_dot_product_attention(*args, **kwargs)

    def _cut(self, query, key, value, lengths: list[int], scale) -> Tensor:
        """Valid tokens sparse; rows of padding dense against the valid keys."""
        if len(set(lengths)) == 1:
            groups = [(slice(None), lengths[0])]
        else:
            groups = [(slice(i, i + 1), length) for i, length in enumerate(lengths)]
        parts = []
        for rows, length in groups:
            q, k, v = query[rows], key[rows, :, :length], value[rows, :, :length]
            out = self._psa(q[:, :, :length], k, v, scale)
            if length < q.shape[2]:
                grouped = q.shape[1] != k.shape[1]
                rest = functional.scaled_dot_product_attention(
                    q[:, :, length:], k, v, scale=scale, enable_gqa=grouped
                )
                out = torch.cat([out, rest], 2)
            parts.append(out)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _psa(self, query, key, value, scale) -> Tensor:
        config = self.config
        if config is None:
            config = self.owner.config_for_length(self.name, query.shape[2])
        else:
            self.owner.check_length(self.name, query.shape[2], config)
        implementation = self.owner.implementation
        self.count("sparse")
        if self.video is not None:
            if scale is not None:
                raise RuntimeError(f"{self.name}: refresh_every takes the default scale only")
            return self.video(query, key, value, implementation=implementation)
        overrides = {} if scale is None else {"scale": scale}
        if not self.owner.record or not torch.compiler.is_compiling() and is_recomputation():
            return psa_attention(
                query, key, value, config=config, implementation=implementation, **overrides
            )
        out, levels = psa_attention(
            query,
            key,
            value,
            config=config,
            implementation=implementation,
            return_levels=True,
            **overrides,
        )
        if config.attn_impl == "new_mask_type":
            levels = from_segments(levels)
        length = query.shape[2]
        self.densities.append(head_density(levels, length, length, config))
        return out


class _Take(TorchFunctionMode):
    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            self.calls += 1
            return self.layer.attend(args, kwargs)
        if func is torch.Tensor.unflatten and torch.compiler.is_compiling():
            # Dynamo cannot trace the `super()` call of the method inside a mode.
            return torch.unflatten(*args, **kwargs)
        return func(*args, **kwargs)


@functools.cache
def _subclass(cls: type) -> type:
    # Keeps the signature: diffusers drops arguments that a processor's signature does not name.
    @functools.wraps(cls.__call__)
    def call(self, *args, **kwargs):
        mode = _Take(self.psa_layer)
        with mode:
            out = cls.__call__(self, *args, **kwargs)
        if not mode.calls:
            raise RuntimeError(
                "the processor did not call scaled_dot_product_attention: another attention "
                "backend is set; call set_attention_backend('native')"
            )
        return out

    return type("PSA" + cls.__name__, (cls,), {"__call__": call})


def wrapped(processor: Any, layer: Layer) -> Any:
    """A copy of `processor` whose scaled_dot_product_attention calls go to `layer`."""
    new = copy.copy(processor)
    new.__class__ = _subclass(type(processor))
    new.psa_layer = layer
    return new


def warn_dense(name: str, reason: str) -> None:
    """Say once a reason that a call was dense."""
    warnings.warn(f"{name}: dense attention instead of PSA: {reason}", RuntimeWarning, stacklevel=2)
