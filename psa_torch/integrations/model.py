"""One transformer that PSA is in: its layers, its hooks, and what its present forward is about."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from psa_torch.integrations.families import Family
from psa_torch.integrations.intercept import Layer, wrapped
from psa_torch.integrations.memory import Memory
from psa_torch.integrations.ordering import Ordering
from psa_torch.integrations.parallel import sharding
from shared_specs.config import PSAConfig

# Typed as anything: what it returns has lost the type of the method.
_uncompiled: Any = torch.compiler.disable


class Model:
    """The layers of one transformer, and what its present forward is about.

    Attributes:
        model, family: the transformer and what is known of its class.
        owner: the `Applied` that holds settings, step and records.
        layers: its attentions over the video.
        grid: tokens (frames, height, width) of the present forward.
        ordering: whether its tokens are in an order as a whole.
        memory: what attentions keep for some steps, if they do.
        inside: why they are moved inside each layer instead; None: they are not, or not yet.
    """

    def __init__(self, model: nn.Module, family: Family, owner: Any) -> None:
        self.model, self.family, self.owner = model, family, owner
        self.implementation, self.record = owner.implementation, owner.record
        self.grid: Any = None  # (frames, height, width)
        self.layers: list[Layer] = []
        self.ordering = Ordering(model, family.route)
        self.inside: str | None = None
        self._signature = inspect.signature(model.forward)
        self._configs: dict[tuple, PSAConfig] = {}
        self._mask: tuple | None = None
        self._places: list[tuple[nn.Module, Any, Any]] = []
        found = [
            (name, module)
            for name, module in model.named_modules()
            if getattr(module, "processor", None) is not None and family.sparse(name)
        ]
        if not found:
            raise ValueError(f"{type(model).__name__} has no attention module the family names")
        if any(hasattr(module.processor, "psa_layer") for _, module in found):
            raise ValueError("PSA is applied to this model already: remove() it first")
        for name, module in found:
            layer = Layer(name, self)
            self.layers.append(layer)
            self._places.append((module, module.processor, wrapped(module.processor, layer)))
        self.memory: Memory | None = None
        if owner.refresh_every > 1:
            if family.cuts_masks:
                raise ValueError(
                    f"refresh_every must be 1 for {type(model).__name__}, whose calls differ in "
                    f"length by their masks; got {owner.refresh_every}"
                )
            self.memory = Memory(self.layers, owner.refresh_every)

    def install(self) -> None:
        for module, _, ours in self._places:
            _set(module, ours)
        self.ordering.install()
        self._hooks = [
            self.model.register_forward_pre_hook(self._enter, with_kwargs=True),
            self.model.register_forward_hook(self._leave),
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self.ordering.remove()
        for module, before, ours in self._places:
            if module.processor is ours:  # a processor set since then is the user's
                _set(module, before)

    # Outside of any graph: a graph that held the step or the grid would be made again for each.
    @_uncompiled
    def _enter(self, model, args, kwargs):
        for (module, _, ours), layer in zip(self._places, self.layers, strict=True):
            if module.processor is not ours:
                raise RuntimeError(
                    f"the processor of {layer.name} was replaced after apply() (fused projections, "
                    "an adapter): remove(), change the model, then apply() again"
                )
        arguments = self._signature.bind(*args, **kwargs).arguments
        self.grid = tuple(self.family.grid(model, arguments))
        dense = self.owner.is_dense_step(arguments)
        for layer in self.layers:
            layer.dense = layer.always_dense or dense
        sharded = self._check_parallelism()
        self.ordering.active = None
        self._mask = None
        moved = None
        if self.owner.config.rearrange_method and not all(layer.dense for layer in self.layers):
            self.inside = self._why_inside_layers(sharded, arguments)
            if self.inside is None:
                names = list(self._signature.parameters)
                moved = self.ordering.begin(self.owner.config, self.grid, args, kwargs, names)
        text = self.owner.text
        if text == "model":
            text = self.family.text(model, arguments)
        config: Any = None if text is None else self._config(text)
        for layer in self.layers:
            layer.config = config
        if self.memory is not None:
            if dense:
                self.memory.forget()
            else:
                records = self.owner.records if self.record else None
                self.memory.begin(self.owner.current_step, config, records)
        return moved

    def _why_inside_layers(self, sharded: bool, arguments) -> str | None:
        if self.owner.order == "layer":
            return "order='layer'"
        if sharded:
            return "the sequence is sharded"
        return self.ordering.why_inside_layers(self.owner.config, arguments)

    @_uncompiled
    def _leave(self, model, args, output):
        self._mask = None
        self.ordering.end()
        if self.record:
            for layer in self.layers:
                for density in layer.densities:
                    self.owner.records.append(layer.name, self.owner.current_step, density)
                layer.densities.clear()

    def _check_parallelism(self) -> bool:
        """Whether diffusers shards the sequence; refuses the ways of it that PSA cannot follow."""
        parallel = sharding(ours for _, _, ours in self._places)
        if parallel is None:
            return False
        if parallel.ring:
            raise RuntimeError("ring attention sees a part of the keys: PSA needs all of them")
        if self.family.joins_text:
            raise RuntimeError("Ulysses interleaves joined text and video: not supported")
        return True

    def _config(self, text: int) -> PSAConfig:
        ordered = self.ordering.active is not None
        key = (self.grid, text, ordered)
        if key not in self._configs:
            self._configs[key] = dataclasses.replace(
                self.owner.config,
                grid=self.grid,
                text_length=text,
                text_position=self.family.text_position,
                rearrange_method=None if ordered else self.owner.config.rearrange_method,
            )
        return self._configs[key]

    def config_for_length(self, name: str, length: int) -> PSAConfig:
        """Configuration where all tokens that the grid does not explain are text."""
        frames, height, width = self.grid
        text = length - frames * height * width
        if text < 0:
            raise ValueError(f"{name}: {length} tokens are fewer than the grid {self.grid} has")
        return self._config(text)

    def check_length(self, name: str, length: int, config: PSAConfig) -> None:
        frames, height, width = config.grid or (0, 0, 0)
        if length != frames * height * width + config.text_length:
            raise ValueError(
                f"{name}: {length} tokens are not the grid {config.grid} and {config.text_length} "
                "of text: the sequence is sharded, or the family does not describe this model"
            )

    def valid_lengths(self, mask, batch: int, keys: int) -> list[int] | None:
        """`prefix_lengths` of the mask, read once if calls share it."""
        if self._mask is None or self._mask[0] is not mask:
            self._mask = (mask, prefix_lengths(mask, batch, keys))
        return self._mask[1]

    def check_places(self, name: str, call: dict) -> None:
        """Refuse a call that tells tokens apart by their places while they are in order.

        Args:
            name: of the layer.
            call: arguments of `scaled_dot_product_attention` by name, causal or with a mask.

        Raises:
            RuntimeError: causal, or the mask is not a prefix of the keys.
        """
        if self.ordering.active is None:
            return
        query, key, mask = call["query"], call["key"], call.get("attn_mask")
        prefix = not call.get("is_causal") and mask is not None and mask.dtype == torch.bool
        if not prefix or self.valid_lengths(mask, query.shape[0], key.shape[2]) is None:
            raise RuntimeError(
                f"{name}: a mask over tokens that are in order; use apply(..., order='layer')"
            )

    def warn(self, name: str, reason: str) -> None:
        self.owner.warn(name, reason)


def prefix_lengths(mask: Tensor, batch: int, keys: int) -> list[int] | None:
    """How many keys each sample of a boolean mask lets see, if they are the first ones.

    Queries after the valid ones are padding, whatever they see. One host read; nothing of the size
    of a square mask is made.

    Args:
        mask: bool, broadcastable to `[batch, H, keys, keys]`.

    Returns:
        None where valid queries see other keys than the first ones, or unlike numbers of them.
    """
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape).expand(batch, -1, -1, keys)
    places = torch.arange(keys, device=mask.device)
    seen = mask.any(2)
    lengths = seen.sum(-1, keepdim=True)
    first = lengths[:, :1]
    ok = (seen == (places < lengths)).all() & (lengths == first).all() & (first > 0).all()
    if mask.shape[2] > 1:
        ok &= ((mask.sum(-1) == first) | (places >= first)).all()
    return first[:, 0, 0].tolist() if bool(ok) else None


def _set(module: Any, processor: Any) -> None:
    if hasattr(module, "set_processor"):
        module.set_processor(processor)
    else:
        module.processor = processor
