"""Pyramid sparse attention as a video model calls it: at every layer, at every denoising step."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from psa_torch._checks import checked_inputs
from psa_torch._config import parse_config, settings_of
from psa_torch.attention import IMPLEMENTATIONS, attend, sparse_attention
from psa_torch.functional import choose_levels
from psa_torch.order import Centroids, TokenOrder
from shared_specs import checks, presets
from shared_specs.config import PSAConfig
from shared_specs.records import DensityRecord, DensityRecords
from shared_specs.selection import candidate_blocks
from shared_specs.video import check_count, is_cross_attention, require_step


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


@dataclasses.dataclass
class VideoState:
    """What the layers of a video model share during one run.

    Attributes:
        step: the denoising step, from 0; the sampling loop sets it.
        records: densities of every layer, head and step.
    """

    step: int = 0
    records: DensityLog = dataclasses.field(default_factory=DensityLog)


class PSAVideoAttention(nn.Module):
    """Pyramid sparse attention with a token order, dense warm-up steps and density records.

    No parameters, and nothing in `state_dict`: what it remembers is in plain attributes.

    Attributes:
        config: the configuration, with the grid of the video if it orders tokens.
        warmup_steps: steps `0 … warmup_steps - 1` use dense attention.
        layer: name of this layer in the records.
        state: the step and the records, shared by all layers of a model; None: the step comes with
            every call, and nothing is recorded.
        centroids: k-means centroids of the latest sparse call, from which the next one starts if
            its step is the same or later.
        centroids_step: the step that left them.
    """

    def __init__(
        self,
        config: PSAConfig | None = None,
        *,
        warmup_steps: int = 0,
        layer: str = "",
        state: VideoState | None = None,
    ) -> None:
        super().__init__()
        if config is not None and not isinstance(config, PSAConfig):
            raise TypeError(f"config must be a PSAConfig or None, got {type(config).__name__}")
        check_count("warmup_steps", warmup_steps)
        self.config = PSAConfig() if config is None else config
        self.warmup_steps = warmup_steps
        self.layer = layer
        self.state = state
        self.reset()

    @classmethod
    def from_preset(
        cls, preset: str, video_size: tuple[int, int, int] | None = None, **arguments
    ) -> PSAVideoAttention:
        """The published configuration and warm-up of a model.

        Args:
            preset: one of `shared_specs.presets.names()`.
            video_size: `(width, height, frames)` in pixels and frames.
            **arguments: `layer` and `state`, as for the class.
        """
        found = presets.load(preset)
        config = found.config_for(video_size)
        return cls(config, warmup_steps=found.warmup_steps, **arguments)

    def reset(self) -> None:
        """Forget the centroids: before another video, or when shapes change."""
        self.centroids: Centroids | None = None
        self.centroids_step = -1

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        step: int | None = None,
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
            cross_attention: keys and values come from somewhere else, of whatever length.
            return_lse: also return the log of the sum of exponentials, `[B, H, Lq]`.
            implementation: of the sparse calls, as in `psa_attention`.

        Returns:
            out `[B, H, Lq, D]`; then lse if asked for.

        Raises:
            TypeError: an argument has a type or dtype that is not accepted.
            ValueError: a shape does not fit, the length is not grid + text, centroids have another
                shape than the last call's, or there are warm-up steps and no step.
        """
        checks.check_flag("cross_attention", cross_attention)
        checks.check_flag("return_lse", return_lse)
        checks.check_implementation(implementation, IMPLEMENTATIONS)
        (q, k, v), _ = checked_inputs(q, k, v)
        if is_cross_attention(q.shape[2], k.shape[2], self.config, cross_attention):
            return self._dense(q, k, v, False, return_lse)
        step = self._step(step)
        if step is not None and step < self.warmup_steps:
            self.reset()
            self._record(step, q.new_ones(q.shape[1], dtype=torch.float32))
            return self._dense(q, k, v, self.config.causal, return_lse)
        return self._sparse(q, k, v, step, return_lse, implementation)

    def _step(self, step: int | None) -> int | None:
        if step is None and self.state is not None:
            step = self.state.step
        if step is None:
            require_step(self.warmup_steps)
            return None
        check_count("step", step)
        return step

    def _sparse(self, q, k, v, step, return_lse, implementation):
        settings = settings_of(self.config, {})
        order = TokenOrder.from_config(settings, q.shape[2], k.shape[2])
        # Centroids of a later step are those of an earlier run.
        warm = step is not None and 0 <= self.centroids_step <= step
        q, k, v, order_state = order.apply(q, k, v, centroids=self.centroids if warm else None)
        if step is not None:
            self.centroids, self.centroids_step = order_state.centroids, step
        levels = choose_levels(q, k, settings).levels
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
            implementation=implementation,
        )
        out = order.undo(out, order_state)
        return (out, order.undo(lse, order_state)) if return_lse else out

    def _dense(self, q, k, v, causal, return_lse):
        settings = settings_of(self.config, {})
        if not return_lse and not (causal and q.shape[2] != k.shape[2]):
            grouped = q.shape[1] != k.shape[1]
            return scaled_dot_product_attention(
                q, k, v, is_causal=causal, scale=settings.scale, enable_gqa=grouped
            )
        # PyTorch's dense attention returns no lse, and aligns causal rows at the first key.
        rows, columns = -(-q.shape[2] // settings.block_m), -(-k.shape[2] // settings.block_n)
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
            self.state.records.append(self.layer, step, density)

    def extra_repr(self) -> str:
        return f"layer={self.layer!r}, warmup_steps={self.warmup_steps}, config={self.config}"


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
    candidates = int(candidate_blocks(q_len, kv_len, parse_config(config)).sum())
    return _mean_cost(levels, candidates)


def _mean_cost(levels: Tensor, candidates: int) -> Tensor:
    cost = (levels > 0) / levels.clamp(min=1).float()
    return cost.sum((0, 2, 3)) / max(1, levels.shape[0] * candidates)


@_head_density.register_fake
def _(levels, q_len, kv_len, config):
    return levels.new_empty(levels.shape[1], dtype=torch.float32)
