"""Pyramid sparse attention as a video model calls it: at every layer, at every denoising step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from psa_torch._checks import checked_inputs
from psa_torch._config import parse_config, settings_of
from psa_torch._transforms import is_forward_mode
from psa_torch._types import VideoCall
from psa_torch._video_memory import (
    RememberingOrder,
    Run,
    new_handle,
    places,
    record_density,
    remembered_levels,
)
from psa_torch.attention import IMPLEMENTATIONS, attend, sparse_attention
from psa_torch.choice import choose_levels
from psa_torch.order import Centroids, TokenOrder
from shared_specs import checks, presets
from shared_specs.config import PSAConfig, check_config
from shared_specs.geometry import cdiv
from shared_specs.records import DensityRecord, DensityRecords
from shared_specs.selection import candidate_blocks
from shared_specs.video import Phases, is_cross_attention, require_step


class DensityLog:
    """Densities of past calls, kept where they were computed until they are read."""

    def __init__(self) -> None:
        self._entries: list[tuple[str, int, Tensor]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def append(self, layer: str, step: int, density: Tensor) -> None:
        """Note the density `[H]` of one call; nothing waits for the device."""
        self._entries.append((layer, step, density))

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()

    def read(self) -> DensityRecords:
        """Everything noted so far, on the host; on a GPU this waits for the device."""
        return DensityRecords(
            DensityRecord(layer, int(step), head, value)
            for layer, step, density in self._entries
            for head, value in enumerate(density.tolist())
        )


class VideoState:
    """What the layers of a video model share during one run.

    Attributes:
        step: the denoising step, from 0; the sampling loop sets it.
        branch: which branch of guidance the calls belong to; the sampling loop sets it where the
            branches are calls of their own, for instance to 'positive' and 'negative'.
        records: densities of every layer, head and step.
    """

    def __init__(
        self, step: int = 0, records: DensityLog | None = None, *, branch: str = ""
    ) -> None:
        self.records = DensityLog() if records is None else records
        self.branch = branch
        self._before: dict[int, bool] = {}
        self.step = step

    @property
    def step(self) -> int:
        """The denoising step."""
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        self._step = step = checks.check_integer("step", step)
        for bound in self._before:
            self._before[bound] = step < bound

    @property
    def branch(self) -> str:
        """The branch of guidance."""
        return self._branch

    @branch.setter
    def branch(self, branch: str) -> None:
        check_branch(branch)
        self._branch = branch

    def is_before(self, bound: int) -> bool:
        """Whether the step is lower than `bound`.

        Decided when the step is set: a compiled call that compared the step itself would be
        compiled for every step.
        """
        if bound not in self._before:
            self._before[bound] = self._step < bound
        return self._before[bound]

    def __repr__(self) -> str:
        return f"VideoState(step={self.step}, branch={self.branch!r}, {len(self.records)} records)"


def check_branch(branch: str) -> None:
    """A branch is a string.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(branch, str):
        raise TypeError(f"branch must be a string, got {branch!r}")


class PSAVideoAttention(nn.Module):
    """Pyramid sparse attention with a token order, dense warm-up steps and density records.

    No parameters, and nothing in `state_dict`: what it remembers is in plain attributes.

    Attributes:
        config: the configuration, with the grid of the video if it orders tokens.
        warmup_steps: steps `0 … warmup_steps - 1` use dense attention.
        refresh_every: steps for which the clusters' order and the levels are kept once chosen; 1
            chooses in every step.
        schedule: first step of a phase -> the budget from there on, or the mask_ratios in other
            modes than 'budget'; before the first one the configuration holds. None: always.
        layer: name of this layer in the records.
        state: the step and the records, shared by all layers of a model; None: the step comes with
            every call, and nothing is recorded.

    The calls of one step start k-means from what the step before left, so they do not depend on
    each other, and a checkpoint that runs one again in the backward pass gets what it got before.
    A step that keeps order and levels uses those of the latest call of the step that chose them.
    """

    if TYPE_CHECKING:  # what `nn.Module` makes of `forward` has no type
        __call__: VideoCall

    def __init__(
        self,
        config: PSAConfig | None = None,
        *,
        warmup_steps: int = 0,
        refresh_every: int = 1,
        schedule: Mapping[int, Any] | None = None,
        layer: str = "",
        state: VideoState | None = None,
    ) -> None:
        super().__init__()
        self.config = check_config(config)
        self.warmup_steps = checks.check_integer("warmup_steps", warmup_steps)
        self.refresh_every = checks.check_integer("refresh_every", refresh_every, 1)
        self.phases = Phases.of(self.config, schedule, self.warmup_steps)
        self.schedule = None if schedule is None else dict(schedule)
        self.layer = layer
        self.state = state
        if state is not None:
            for bound in (self.warmup_steps, *self.phases.firsts):
                state.is_before(bound)  # known from now on, so that no compiled call adds it
        self.reset()
        self._handle = new_handle(self)

    @classmethod
    def from_preset(
        cls, preset: str, video_size: tuple[int, int, int] | None = None, **arguments
    ) -> PSAVideoAttention:
        """The published configuration and warm-up of a model.

        Args:
            preset: one of `shared_specs.presets.names()`.
            video_size: `(width, height, frames)` in pixels and frames.
            **arguments: `refresh_every`, `schedule`, `layer` and `state`, as for the class.
        """
        found = presets.load(preset)
        config = found.config_for(video_size)
        return cls(config, warmup_steps=found.warmup_steps, **arguments)

    def reset(self) -> None:
        """Forget centroids, order and levels: before another video, or when shapes change."""
        self._runs: dict[str, Run] = {}

    @property
    def centroids(self) -> Centroids | None:
        """k-means centroids of the latest sparse call of the branch ''; None before one."""
        run = self._runs.get("")
        return None if run is None else run.centroids()

    @property
    def centroids_step(self) -> int:
        """The step that left them, -1 before one."""
        run = self._runs.get("")
        return -1 if run is None else run.chosen_at

    def __setstate__(self, state: dict) -> None:
        # A copy has a memory of its own.
        super().__setstate__(state)
        self._handle = new_handle(self)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        step: int | None = None,
        branch: str | None = None,
        cross_attention: bool = False,
        return_lse: bool = False,
        implementation: str | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention over text and video tokens, in the order that they come in.

        Dense where the model needs it: in the warm-up steps, and for cross-attention, which is
        what `cross_attention=True` says, or keys of another length than the queries unless
        `config.causal` (then they are a longer past).

        Args:
            q: `[B, H, Lq, D]`.
            k, v: `[B, Hk, Lk, D]`, `H % Hk == 0`.
            step: the denoising step, from 0; None means `self.state.step`.
            branch: which branch of guidance this is, where the branches of a step are calls of
                their own: each then has its own centroids. None means `self.state.branch`, or
                one branch for all without a state.
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
        checks.check_flag("cross_attention", cross_attention)
        checks.check_flag("return_lse", return_lse)
        checks.check_implementation(implementation, IMPLEMENTATIONS)
        (q, k, v), _ = checked_inputs(q, k, v)
        if is_cross_attention(q.shape[2], k.shape[2], self.config, cross_attention):
            return self._dense(q, k, v, False, return_lse)
        if branch is not None:
            check_branch(branch)
        if step is None and self.state is None:
            require_step(
                warmup_steps=self.warmup_steps,
                refresh_every=self.refresh_every,
                phases=self.phases,
            )
        if self._is_before(step, self.warmup_steps):
            self.reset()
            self._record(step, q.new_ones(q.shape[1], dtype=torch.float32))
            return self._dense(q, k, v, self.config.causal, return_lse)
        return self._sparse(q, k, v, step, branch, return_lse, implementation)

    def _is_before(self, step: int | None, bound: int) -> bool:
        if step is not None:
            return checks.check_integer("step", step) < bound
        return self.state is not None and self.state.is_before(bound)

    def _config(self, step: int | None) -> PSAConfig:
        """The configuration of the phase that the step is in."""
        index = 0
        for first in self.phases.firsts[1:]:
            if not self._is_before(step, first):
                index += 1
        return self.phases.configs[index] if len(self.phases.firsts) > 1 else self.config

    def _sparse(self, q, k, v, step, branch, return_lse, implementation):
        settings = settings_of(self._config(step), {})
        if step is None and self.state is None:
            kind, centroids = TokenOrder, None
        else:
            kind, centroids = RememberingOrder, places(settings, self._handle, step, branch)
        order = kind.from_config(settings, q.shape[2], k.shape[2])
        q, k, v, order_state = order.apply(q, k, v, centroids=centroids)
        if self.refresh_every == 1:
            levels = choose_levels(q, k, settings).levels
        else:
            levels = remembered_levels(
                q.detach(), k.detach(), settings.to_json(), self._handle, step, branch
            )
        if self.state is not None:
            self._record(step, head_density(levels, q.shape[2], k.shape[2], self.config))
        out, lse = attend(
            q,
            k,
            v,
            levels,
            block_m=settings.block_m,
            block_n=settings.block_n,
            scale=settings.scale,
            is_causal=settings.causal,
            rest=settings.rest,
            implementation=implementation,
        )
        out = order.undo(out, order_state)
        return (out, order.undo(lse, order_state)) if return_lse else out

    def _dense(self, q, k, v, causal, return_lse):
        settings = settings_of(self.config, {})
        aligned = not causal or q.shape[2] == k.shape[2]
        if not return_lse and aligned and not is_forward_mode():
            grouped = q.shape[1] != k.shape[1]
            return scaled_dot_product_attention(
                q, k, v, is_causal=causal, scale=settings.scale, enable_gqa=grouped
            )
        # PyTorch's dense attention returns no lse, has no forward mode on a CPU, and aligns
        # causal rows at the first key.
        rows, columns = cdiv(q.shape[2], settings.block_m), cdiv(k.shape[2], settings.block_n)
        return sparse_attention(
            q,
            k,
            v,
            torch.ones(*q.shape[:2], rows, columns, dtype=torch.int32, device=q.device),
            block_m=settings.block_m,
            block_n=settings.block_n,
            scale=settings.scale,
            is_causal=causal,
            return_lse=return_lse,
        )

    def _record(self, step: int | None, density: Tensor) -> None:
        if self.state is not None:
            record_density(density, self._handle, step)

    def extra_repr(self) -> str:
        return (
            f"layer={self.layer!r}, warmup_steps={self.warmup_steps}, "
            f"refresh_every={self.refresh_every}, schedule={self.schedule}, config={self.config}"
        )


def head_density(levels: Tensor, q_len: int, kv_len: int, config: PSAConfig) -> Tensor:
    """Density of each head (specification, section 9), float32 `[H]`, on the device of `levels`.

    Args:
        levels: int32 `[B, H, Nq, Nk]`.
        q_len, kv_len: tokens.
        config: the configuration that the levels were chosen by.
    """
    return _head_density(levels, q_len, kv_len, settings_of(config, {}).to_json())


@torch.library.custom_op("psa::head_density", mutates_args=())
def _head_density(levels: Tensor, q_len: int, kv_len: int, config: str) -> Tensor:
    settings = parse_config(config)
    candidates = int(candidate_blocks(q_len, kv_len, settings).sum()) * levels.shape[0]
    listed = levels > 0
    cost = (listed / levels.clamp(min=1).float()).sum((0, 2, 3))
    if settings.is_rest_mean:
        cost += (candidates - listed.sum((0, 2, 3))) * settings.rest_share
    return cost / max(1, candidates)


@_head_density.register_fake
def _(levels, q_len, kv_len, config):
    return levels.new_empty(levels.shape[1], dtype=torch.float32)


@_head_density.register_vmap
def _(info, in_dims, levels, *arguments):
    heads = levels.movedim(in_dims[0], 1).flatten(1, 2)  # heads do not interact
    return _head_density(heads, *arguments).unflatten(0, (info.batch_size, -1)), 0
