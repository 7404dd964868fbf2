"""Pyramid sparse attention in diffusers' video transformers.

The model's own attention processors run; inside them, `scaled_dot_product_attention` over the video
goes to `psa_attention`. Nothing of diffusers is copied or replaced.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from psa_torch.attention import IMPLEMENTATIONS
from psa_torch.integrations.families import FAMILIES, Family, family_of
from psa_torch.integrations.intercept import Layer, warn_dense, wrapped
from psa_torch.integrations.settings import config_and_warmup
from psa_torch.video import DensityLog
from shared_specs import checks
from shared_specs.config import PSAConfig

__all__ = ["FAMILIES", "Applied", "Family", "apply"]


class _Model:
    """The layers of one transformer, and what its present forward is about."""

    def __init__(self, model: nn.Module, family: Family, owner: Applied) -> None:
        self.model, self.family, self.owner = model, family, owner
        self.implementation, self.record = owner.implementation, owner.record
        self.grid: tuple[int, int, int] | None = None
        self.layers: list[Layer] = []
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

    def install(self) -> None:
        for module, _, ours in self._places:
            _set(module, ours)
        self._hooks = [
            self.model.register_forward_pre_hook(self._enter, with_kwargs=True),
            self.model.register_forward_hook(self._leave),
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for module, before, ours in self._places:
            if module.processor is ours:  # a processor set since then is the user's
                _set(module, before)

    def _enter(self, model, args, kwargs):
        for (module, _, ours), layer in zip(self._places, self.layers, strict=True):
            if module.processor is not ours:
                raise RuntimeError(
                    f"the processor of {layer.name} was replaced after apply() (fused projections, "
                    "an adapter): remove(), change the model, then apply() again"
                )
        self._refuse_parallelism()
        arguments = self._signature.bind(*args, **kwargs).arguments
        self.grid = tuple(self.family.grid(model, arguments))
        text = self.owner.text
        if text == "model":
            text = self.family.text(model, arguments)
        config = None if text is None else self._config(text)
        self._mask = None
        dense = self.owner.is_dense_step(arguments)
        for layer in self.layers:
            layer.config = config
            layer.dense = layer.always_dense or dense

    def _leave(self, model, args, output):
        if self.record:
            for layer in self.layers:
                for density in layer.densities:
                    self.owner.records.append(layer.name, self.owner.current_step, density)
                layer.densities.clear()

    def _refuse_parallelism(self) -> None:
        for _, _, ours in self._places:
            parallel = getattr(ours, "_parallel_config", None)
            context = getattr(parallel, "context_parallel_config", None)
            if context is None:
                continue
            if (getattr(context, "ring_degree", 1) or 1) > 1:
                raise RuntimeError("ring attention sees a part of the keys: PSA needs all of them")
            if self.family.text is not Family.text:
                raise RuntimeError("Ulysses interleaves joined text and video: not supported")

    def _config(self, text: int) -> PSAConfig:
        key = (self.grid, text)
        if key not in self._configs:
            self._configs[key] = dataclasses.replace(
                self.owner.config,
                grid=self.grid,
                text_length=text,
                text_position=self.family.text_position,
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
        frames, height, width = config.grid
        if length != frames * height * width + config.text_length:
            raise ValueError(
                f"{name}: {length} tokens are not the grid {config.grid} and {config.text_length} "
                "of text: the sequence is sharded, or the family does not describe this model"
            )

    def valid_lengths(self, mask, batch: int, keys: int) -> list[int] | None:
        """Valid keys of each sample if they come first, else None; one host read a mask."""
        if self._mask is None or self._mask[0] is not mask:
            row = mask.expand(batch, *mask.shape[1:])
            row = row.reshape(batch, -1, mask.shape[-1])[:, 0].expand(batch, keys)
            lengths = row.sum(-1)
            prefix = torch.arange(keys, device=mask.device) < lengths[:, None]
            ok = (row == prefix).all() & (lengths > 0).all()
            self._mask = (mask, lengths.tolist() if bool(ok) else None)
        return self._mask[1]

    def warn(self, name: str, reason: str) -> None:
        self.owner.warn(name, reason)


class Applied:
    """PSA inside a model: what `apply` returns. A context manager that removes it at the end.

    Attributes:
        config: the configuration, without grid and text length.
        warmup_steps: steps `0 … warmup_steps - 1` are dense.
        records: densities by layer and step, if asked for.
    """

    def __init__(self, pipe, models, config, settings) -> None:
        self.config = config
        self.warmup_steps: int = settings["warmup_steps"]
        self.text = settings["text"]
        self.record: bool = settings["record"]
        self.implementation = settings["implementation"]
        self.records = DensityLog()
        self.current_step = 0
        self._pipe = pipe
        self._step: int | None = None
        self._warned: set[str] = set()
        self._models = [_Model(model, family, self) for model, family in models]
        self._mark_dense(settings["dense_layers"])
        for model in self._models:
            model.install()

    def _mark_dense(self, dense_layers) -> None:
        dense_layers = list(dense_layers)
        for model in self._models:
            names = [layer.name for layer in model.layers]
            for entry in dense_layers:
                if not (entry in names or type(entry) is int and 0 <= entry < len(names)):
                    raise ValueError(
                        f"dense_layers: {entry!r} is neither an index below {len(names)} nor one "
                        f"of {', '.join(names)}"
                    )
            for index, layer in enumerate(model.layers):
                layer.always_dense = index in dense_layers or layer.name in dense_layers

    @property
    def layers(self) -> list[Layer]:
        """The attentions that PSA is in, in the order of the model."""
        return [layer for model in self._models for layer in model.layers]

    @property
    def step(self) -> int | None:
        """The denoising step that was set, from 0; None: the pipeline's scheduler tells it."""
        return self._step

    @step.setter
    def step(self, value: int | None) -> None:
        self._step = None if value is None else checks.check_integer("step", value)

    def on_step_end(self, pipe, step: int, timestep, callback_kwargs: dict) -> dict:
        """For `callback_on_step_end=`: the next step, or 0 after the last."""
        self.step = 0 if step + 1 >= pipe.num_timesteps else step + 1
        return callback_kwargs

    def is_dense_step(self, arguments) -> bool:
        """Whether the forward that starts now is a warm-up step; notes the step."""
        known = self._step
        if known is None and (self.warmup_steps or self.record):
            known = self._scheduler_step(arguments)
        if known is None and self.warmup_steps:
            raise RuntimeError(
                f"warmup_steps={self.warmup_steps} but the step is not known: set psa.step, pass "
                "callback_on_step_end=psa.on_step_end with psa.step = 0, or apply to a pipeline"
            )
        self.current_step = known or 0
        return self.current_step < self.warmup_steps

    def _scheduler_step(self, arguments) -> int | None:
        scheduler = getattr(self._pipe, "scheduler", None)
        if scheduler is None:
            return None
        if hasattr(scheduler, "step_index"):
            return scheduler.step_index or 0  # None before the first step()
        timestep = arguments["timestep"].flatten()[0].to(scheduler.timesteps)
        where = (scheduler.timesteps == timestep).nonzero()
        return int(where[0]) if len(where) else None

    def warn(self, name: str, reason: str) -> None:
        """Warn once for each reason."""
        if reason not in self._warned:
            self._warned.add(reason)
            warn_dense(name, reason)

    def table(self) -> str:
        """One line an attention: how many calls were sparse, and why the others were dense."""
        return "\n".join(
            f"{layer.name}: "
            + (", ".join(f"{n} {what}" for what, n in layer.calls.items()) or "no call yet")
            for layer in self.layers
        )

    def reset(self) -> None:
        """Forget step, records and counts: before another video."""
        self._step, self.current_step = None, 0
        self.records.clear()
        for layer in self.layers:
            layer.calls.clear()

    def remove(self) -> None:
        """Put the model's own processors back."""
        for model in self._models:
            model.remove()
        self._models = []

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *error) -> None:
        self.remove()


def apply(
    target,
    preset: str | None = None,
    *,
    config: PSAConfig | None = None,
    warmup_steps: int | None = None,
    dense_layers: Iterable[int | str] = (),
    text: int | str = "model",
    family: Family | str | None = None,
    record: bool = False,
    implementation: str | None = None,
) -> Applied:
    """Let a diffusers pipeline or transformer attend over its video with PSA.

    Args:
        target: a pipeline (its `transformer` and `transformer_2`) or a transformer.
        preset: one of `shared_specs.presets.names()`; exactly one of preset and config.
        config: grid and text length are those of each forward, whatever it says.
        warmup_steps: dense steps at the start; None: the preset's, or 0.
        dense_layers: indices or names of attentions that stay dense.
        text: number of joined text tokens, or 'model': what the family says.
        family: a `Family`, a key of `FAMILIES`, or None: by the class of the transformer.
        record: keep the density of every call in `records`.
        implementation: of the sparse calls, as in `psa_attention`.

    Raises:
        TypeError: an argument has a type that is not accepted.
        ValueError: a value is not accepted, no family lists the class, or PSA is in already.
    """
    config, usual = config_and_warmup(preset, config)
    warmup_steps = usual if warmup_steps is None else warmup_steps
    warmup_steps = checks.check_integer("warmup_steps", warmup_steps)
    if text != "model":
        text = checks.check_integer("text", text)
    checks.check_flag("record", record)
    checks.check_implementation(implementation, IMPLEMENTATIONS)
    if isinstance(target, nn.Module):
        pipe, models = None, [target]
    else:
        pipe = target
        models = [getattr(target, name, None) for name in ("transformer", "transformer_2")]
        models = [model for model in models if model is not None]
        if not models:
            raise TypeError(
                f"target must be a transformer or a pipeline with one, got {type(target).__name__}"
            )
    settings = {
        "warmup_steps": warmup_steps,
        "dense_layers": dense_layers,
        "text": text,
        "record": record,
        "implementation": implementation,
    }
    return Applied(pipe, [(model, family_of(model, family)) for model in models], config, settings)


def _set(module: nn.Module, processor: Any) -> None:
    if hasattr(module, "set_processor"):
        module.set_processor(processor)
    else:
        module.processor = processor
