"""Pyramid sparse attention as a video model calls it: at every layer, at every denoising step."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, Unpack, overload

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from psa_jax._types import VideoArguments
from psa_jax._video_call import NOT_CALLED, VideoCall, call_with, new_memory
from shared_specs import checks, presets
from shared_specs.config import PSAConfig
from shared_specs.records import DensityRecord, DensityRecords

STATE = "psa"
"""The Flax variable collection that holds centroids and density records."""


class PSAVideoAttention(nn.Module):
    """Pyramid sparse attention with a token order, dense warm-up steps and density records.

    No parameters. What it remembers is in the variable collection 'psa', which `jit` carries.
    Start with `state = {}`. Without `mutable=["psa"]` it computes the same and remembers nothing.

    The calls of one step start k-means from what the step before left, so they do not depend on
    each other, and a checkpoint that runs one again in the backward pass gets what it got before.

    Attributes:
        config: the configuration, with the grid of the video if it orders tokens; None means the
            default one.
        warmup_steps: steps `0 … warmup_steps - 1` use dense attention.
        refresh_every: steps for which the clusters' order and the levels are kept once chosen; 1
            chooses in every step.
        schedule: first step of a phase -> the budget from there on, or the mask_ratios in other
            modes than 'budget'; before the first one the configuration holds. None: always.
        record_steps: densities of the steps `0 … record_steps - 1` are recorded; read them with
            `density_records`.

    Examples:
        >>> out, state = module.apply(state, q, k, v, step=step, mutable=["psa"])
    """

    config: PSAConfig | None = None
    warmup_steps: int = 0
    refresh_every: int = 1
    schedule: Mapping[int, Any] | None = None
    record_steps: int = 0

    @classmethod
    def from_preset(
        cls, preset: str, video_size: tuple[int, int, int] | None = None, **arguments
    ) -> PSAVideoAttention:
        """The published configuration and warm-up of a model.

        Args:
            preset: one of `shared_specs.presets.names()`.
            video_size: `(width, height, frames)` in pixels and frames.
            **arguments: `refresh_every`, `schedule`, `record_steps` and the `name` of the Flax
                module, as for the class.
        """
        found = presets.load(preset)
        config = found.config_for(video_size)
        return cls(config=config, warmup_steps=found.warmup_steps, **arguments)

    @overload
    def __call__(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        return_lse: Literal[False] = False,
        **arguments: Unpack[VideoArguments],
    ) -> Array: ...
    @overload
    def __call__(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        return_lse: Literal[True],
        **arguments: Unpack[VideoArguments],
    ) -> tuple[Array, Array]: ...
    @overload
    def __call__(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        return_lse: bool,
        **arguments: Unpack[VideoArguments],
    ) -> Array | tuple[Array, ...]: ...
    @nn.compact
    def __call__(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        step: int | Array | None = None,
        branch: str = "",
        cross_attention: bool = False,
        return_lse: bool = False,
        implementation: str | None = None,
    ) -> Array | tuple[Array, ...]:
        """Attention over text and video tokens, in the order that they come in.

        Dense where the model needs it: in the warm-up steps, and for cross-attention, which is
        what `cross_attention=True` says, or keys of another length than the queries unless
        `config.causal` (then they are a longer past).

        Args:
            q: `[B, H, Lq, D]`.
            k, v: `[B, Hk, Lk, D]`, `H % Hk == 0`.
            step: the denoising step, from 0; a Python integer, or an integer scalar that `jit`
                traces (then both kinds of attention are compiled). None, without warm-up steps
                only: k-means starts cold and nothing is remembered.
            branch: which branch of guidance this is, where the branches of a step are calls of
                their own: each then has its own centroids.
            cross_attention: keys and values come from somewhere else, of whatever length.
            return_lse: also return the log of the sum of exponentials, `[B, H, Lq]`.
            implementation: of the sparse calls, as in `psa_attention`.

        Returns:
            out `[B, H, Lq, D]`; then lse if asked for.

        Raises:
            TypeError: an argument has a type or dtype that is not accepted.
            ValueError: a shape does not fit, the length is not grid + text, what is remembered has
                another shape than this call needs, or there is no step where one decides.
        """
        checks.check_integer("record_steps", self.record_steps)
        call = VideoCall.checked(
            q,
            k,
            v,
            config=self.config,
            warmup_steps=self.warmup_steps,
            refresh_every=self.refresh_every,
            schedule=self.schedule,
            step=step,
            branch=branch,
            cross_attention=cross_attention,
            return_lse=return_lse,
            implementation=implementation,
        )
        variables = self._variables(call, branch) if call.is_remembered else None
        memory = None
        if variables is not None:
            memory = {name: variable.value for name, variable in variables.items()}
        called, memory = call_with(call, memory)
        keeps = self.is_mutable_collection(STATE) and not self.is_initializing()
        if variables is not None and memory is not None and keeps:
            # What other branches clustered before a warm-up step is another video's too.
            for name in self.variables[STATE]:
                if name.partition("[")[0] == "centroids_step":
                    other = self.get_variable(STATE, name)
                    self.put_variable(STATE, name, jnp.where(called.warming_up, -1, other))
            for name, variable in variables.items():
                variable.value = memory[name]
        return called.output

    def _variables(self, call: VideoCall, branch: str) -> dict[str, nn.Variable] | None:
        """The variables of this layer and branch; None where the caller carries none."""
        suffix = f"[{branch}]" if branch else ""
        step = "centroids_step" + suffix
        if not (self.is_mutable_collection(STATE) or self.has_variable(STATE, step)):
            return None
        return {
            name: self.variable(STATE, name + suffix, lambda value=value: value)
            for name, value in new_memory(call, self.record_steps).items()
        }


def density_records(variables: Mapping[str, Any]) -> DensityRecords:
    """The densities that a model's `PSAVideoAttention` layers recorded; this waits for the device.

    Args:
        variables: what `apply(..., mutable=["psa"])` returned, or all variables of the model.

    Returns:
        One record per layer, step and head, by step; a layer is named by its path in the model,
        joined by dots, and numbered where `nn.scan` or `nn.vmap` stacked several.
    """
    return records_of(_densities(variables.get(STATE, {}), ()))


def records_of(layers: Iterable[tuple[str, np.ndarray]]) -> DensityRecords:
    """Records of layers by name, `[..., record_steps, H]` each, by step."""
    layers = [
        (".".join((*((name,) if name else ()), *map(str, place))), density[place])
        for name, density in layers
        for place in np.ndindex(density.shape[:-2])
    ]
    rows = [
        DensityRecord(layer, step, head, float(value))
        for layer, density in sorted(layers, key=lambda item: _natural(item[0]))
        for step, heads in enumerate(density)
        for head, value in enumerate(heads)
        if value != NOT_CALLED
    ]
    return DensityRecords(sorted(rows, key=lambda record: record.step))


def _densities(tree: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[str, np.ndarray]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _densities(value, (*path, name))
        elif name == "density" or name.startswith("density["):  # of a branch
            yield ".".join(path), np.asarray(value)


def _natural(name: str) -> list:
    """Sorts blocks_2 before blocks_10."""
    return [
        (not part.isdigit(), int(part) if part.isdigit() else part)
        for part in re.split(r"(\d+)", name)
        if part
    ]
