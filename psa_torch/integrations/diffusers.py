"""Pyramid sparse attention in diffusers' video transformers.

The model's own attention processors run; inside them, `scaled_dot_product_attention` over the video
goes to `psa_attention`. Nothing of diffusers is copied or replaced.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from psa_torch.attention import IMPLEMENTATIONS
from psa_torch.integrations.families import FAMILIES, Family, family_of
from psa_torch.integrations.intercept import Layer, warn_dense
from psa_torch.integrations.model import Model
from psa_torch.integrations.ordering import Route
from psa_torch.integrations.settings import config_and_warmup
from psa_torch.video import DensityLog
from shared_specs import checks
from shared_specs.config import PSAConfig

__all__ = ["FAMILIES", "Applied", "Family", "Route", "apply"]


class Applied:
    """PSA inside a model: what `apply` returns. A context manager that removes it at the end.

    A deep copy of the model has PSA too: it follows this step and writes to these records, and
    `remove` does not reach it.

    Attributes:
        config: the configuration, without grid and text length.
        warmup_steps: steps `0 … warmup_steps - 1` are dense.
        records: densities by layer and step, if asked for.
    """

    def __init__(self, pipe, models, config, settings) -> None:
        self.config = config
        self.warmup_steps: int = settings["warmup_steps"]
        self.text = settings["text"]
        self.order: str = settings["order"]
        self.refresh_every: int = settings["refresh_every"]
        self.record: bool = settings["record"]
        self.implementation = settings["implementation"]
        self.records = DensityLog()
        self.current_step = 0
        self._pipe = pipe
        self._step: int | None = None
        self._warned: set[str] = set()
        self._models = [Model(model, family, self) for model, family in models]
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
        self.current_step = 0
        if not (self.warmup_steps or self.record or self.refresh_every > 1):
            return False
        known = self._scheduler_step(arguments) if self._step is None else self._step
        if known is None:
            raise RuntimeError(
                f"the step is not known, which warmup_steps={self.warmup_steps}, "
                f"refresh_every={self.refresh_every} and record={self.record} need: set psa.step, "
                "pass callback_on_step_end=psa.on_step_end with psa.step = 0, or apply to a "
                "pipeline"
            )
        self.current_step = known
        return known < self.warmup_steps

    def _scheduler_step(self, arguments) -> int | None:
        """Where the pipeline's scheduler is in its timesteps, which may start after the first."""
        scheduler = getattr(self._pipe, "scheduler", None)
        if scheduler is None:
            return None
        if hasattr(scheduler, "step_index"):
            if scheduler.step_index is not None:
                return scheduler.step_index
            return getattr(scheduler, "begin_index", None) or 0  # before the first step()
        # Tokens of a given frame have timestep 0; the others have the step's.
        timestep = arguments["timestep"].max().to(scheduler.timesteps)
        where = (scheduler.timesteps == timestep).nonzero()
        return int(where[0]) if len(where) else None

    def warn(self, name: str, reason: str) -> None:
        """Warn once for each reason."""
        if reason not in self._warned:
            self._warned.add(reason)
            warn_dense(name, reason)

    def table(self) -> str:
        """One line an attention: how many calls were sparse, and why the others were dense.

        Before them, for each model whose tokens are moved inside each layer, why.
        """
        lines = []
        for model in self._models:
            if model.inside:
                lines.append(f"token order inside each layer: {model.inside}")
            for layer in model.layers:
                calls = ", ".join(f"{n} {what}" for what, n in layer.calls.items())
                lines.append(f"{layer.name}: {calls or 'no call yet'}")
        return "\n".join(lines)

    def reset(self) -> None:
        """Forget step, records, counts and what is kept for some steps: before another video."""
        self._step, self.current_step = None, 0
        self.records.clear()
        for model in self._models:
            if model.memory is not None:
                model.memory.forget()
        for layer in self.layers:
            layer.calls.clear()

    def remove(self) -> None:
        """Put the model's own processors back."""
        for model in self._models:
            model.remove()
        self._models = []

    def __deepcopy__(self, memo) -> Applied:
        # A copy of the model has PSA too, under this handle: one step, one set of records.
        return self

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
    order: str = "model",
    refresh_every: int = 1,
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
        order: 'model': a token order that the grid decides is entered once a forward, where the
            family allows it, so that hooks on blocks see tokens in order; 'layer': tokens are
            moved inside each attention.
        refresh_every: steps for which levels, and the order of clusters, are kept once chosen, for
            each branch of guidance, which is the n-th forward of a step; as in
            `PSAVideoAttention`.
        record: keep the density of every call in `records`; the step has to be known.
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
    if order not in ("model", "layer"):
        raise ValueError(f"order must be 'model' or 'layer', got {order!r}")
    refresh_every = checks.check_integer("refresh_every", refresh_every, 1)
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
        "order": order,
        "refresh_every": refresh_every,
        "record": record,
        "implementation": implementation,
    }
    return Applied(pipe, [(model, family_of(model, family)) for model in models], config, settings)
