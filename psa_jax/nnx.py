"""Pyramid sparse attention as modules of Flax NNX, beside those of linen, and equal to them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from psa_jax._video_call import VideoCall, call_with, new_memory
from psa_jax.functional import psa_attention, resolve_config
from psa_jax.video import records_of
from shared_specs import checks, presets
from shared_specs.config import PSAConfig
from shared_specs.records import DensityRecords
from shared_specs.video import Phases


class PSAState(nnx.Variable):
    """What a `PSAVideoAttention` remembers between calls: centroids, steps and densities."""


class PSAAttention(nnx.Module):
    """Pyramid sparse attention with a fixed configuration; no parameters, no state.

    Attributes:
        config: the configuration, static; None means the default one.
    """

    def __init__(self, config: PSAConfig | None = None) -> None:
        self.config = resolve_config(config, {})

    def __call__(self, q: Array, k: Array, v: Array, **arguments) -> Array | tuple[Array, ...]:
        """`psa_jax.psa_attention` with this module's configuration; arguments as there."""
        return psa_attention(q, k, v, config=self.config, **arguments)


class PSAVideoAttention(nnx.Module):
    """Pyramid sparse attention with a token order, dense warm-up steps and density records.

    No parameters. What it remembers are variables of the type `PSAState`; `nnx.jit` and `nnx.remat`
    carry them. They are made by the first call of a branch, or by `prepare`, which `nnx.scan`
    needs, as it lets no call add variables.

    Attributes:
        config: the configuration, with the grid of the video if it orders tokens; None means the
            default one.
        warmup_steps: steps `0 … warmup_steps - 1` use dense attention.
        refresh_every, schedule: as for `psa_jax.PSAVideoAttention`.
        record_steps: densities of the steps `0 … record_steps - 1` are recorded; read them with
            `density_records`.

    The calls of one step start k-means from what the step before left, so they do not depend on
    each other, and a checkpoint that runs one again in the backward pass gets what it got before.
    """

    def __init__(
        self,
        config: PSAConfig | None = None,
        *,
        warmup_steps: int = 0,
        refresh_every: int = 1,
        schedule: Mapping[int, Any] | None = None,
        record_steps: int = 0,
    ) -> None:
        self.config = resolve_config(config, {})
        self.warmup_steps = checks.check_integer("warmup_steps", warmup_steps)
        self.refresh_every = checks.check_integer("refresh_every", refresh_every, 1)
        Phases.of(self.config, schedule, self.warmup_steps)  # refuses
        self.schedule = None if schedule is None else MappingProxyType(dict(schedule))
        self.record_steps = checks.check_integer("record_steps", record_steps)
        self.memory = nnx.Dict()

    @classmethod
    def from_preset(
        cls, preset: str, video_size: tuple[int, int, int] | None = None, **arguments: Any
    ) -> PSAVideoAttention:
        """The published configuration and warm-up of a model.

        Args:
            preset: one of `shared_specs.presets.names()`.
            video_size: `(width, height, frames)` in pixels and frames.
            **arguments: `refresh_every`, `schedule` and `record_steps`, as for the class.
        """
        found = presets.load(preset)
        return cls(found.config_for(video_size), warmup_steps=found.warmup_steps, **arguments)

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
        """As `psa_jax.PSAVideoAttention`: same arguments, results and errors."""
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
        memory = None
        if call.is_remembered:
            stored = self._of_branch(call, branch)
            memory = {name: variable[...] for name, variable in stored.items()}
        called, memory = call_with(call, memory)
        if memory is not None:
            # What other branches clustered before a warm-up step is another video's too.
            for other in self.memory.values():
                other["centroids_step"][...] = jnp.where(
                    called.warming_up, -1, other["centroids_step"][...]
                )
            for name, value in memory.items():
                stored[name][...] = value
        return called.output

    def prepare(self, q: Array, k: Array, v: Array, *branches: str) -> None:
        """Make the variables of branches ahead of their first call, for arrays of these shapes.

        Args:
            q, k, v: arrays, or what `jax.eval_shape` returns.
            *branches: names; none means the branch ''.
        """
        q, k, v = (jnp.zeros(x.shape, x.dtype) for x in (q, k, v))
        for branch in branches or ("",):
            call = VideoCall.checked(
                q,
                k,
                v,
                config=self.config,
                warmup_steps=self.warmup_steps,
                refresh_every=self.refresh_every,
                schedule=self.schedule,
                step=0,
                branch=branch,
                cross_attention=False,
                return_lse=False,
                implementation=None,
            )
            if call.is_remembered:
                self._of_branch(call, branch)

    def reset(self) -> None:
        """Forget everything, records too: before another video, or when shapes change."""
        self.memory = nnx.Dict()

    def _of_branch(self, call: VideoCall, branch: str) -> nnx.Dict:
        if branch not in self.memory:
            new = new_memory(call, self.record_steps)
            self.memory[branch] = nnx.Dict({name: PSAState(value) for name, value in new.items()})
        return self.memory[branch]


def density_records(model: nnx.Module) -> DensityRecords:
    """The densities that a model's `PSAVideoAttention` layers recorded; this waits for the device.

    Args:
        model: any module of NNX.

    Returns:
        One record per layer, step and head, by step; a layer is named by its path in the model,
        joined by dots, and numbered where `nnx.vmap` or `nnx.scan` stacked several.
    """
    return records_of(
        (".".join(map(str, path)), np.asarray(memory["density"][...]))
        for path, module in nnx.iter_modules(model)
        if isinstance(module, PSAVideoAttention)
        for memory in module.memory.values()
        if "density" in memory
    )
