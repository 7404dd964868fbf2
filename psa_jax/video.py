"""Pyramid sparse attention as a video model calls it: at every layer, at every denoising step."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from psa_jax._arrays import describe
from psa_jax._sharding import per_shard
from psa_jax.attention import IMPLEMENTATIONS, sparse_attention
from psa_jax.functional import choose_levels, resolve_config
from psa_jax.order import Centroids, Resumed, TokenOrder
from shared_specs import checks, presets
from shared_specs.config import PSAConfig
from shared_specs.records import DensityRecord, DensityRecords
from shared_specs.selection import candidate_blocks
from shared_specs.video import is_cross_attention, require_step

STATE = "psa"
"""The Flax variable collection that holds centroids and density records."""

NOT_CALLED = -1.0
"""Stands in the density record of a step that has not been computed."""


class PSAVideoAttention(nn.Module):
    """Pyramid sparse attention with a token order, dense warm-up steps and density records.

    No parameters. What it remembers is in the variable collection 'psa', which `jit` carries.
    Start with `state = {}`. Without `mutable=["psa"]` it computes the same and remembers nothing.

    Attributes:
        config: the configuration, with the grid of the video if it orders tokens; None means the
            default one.
        warmup_steps: steps `0 … warmup_steps - 1` use dense attention.
        record_steps: densities of the steps `0 … record_steps - 1` are recorded; read them with
            `density_records`.

    Examples:
        >>> out, state = module.apply(state, q, k, v, step=step, mutable=["psa"])
    """

    config: PSAConfig | None = None
    warmup_steps: int = 0
    record_steps: int = 0

    @classmethod
    def from_preset(
        cls, preset: str, video_size: tuple[int, int, int] | None = None, **arguments
    ) -> PSAVideoAttention:
        """The published configuration and warm-up of a model.

        Args:
            preset: one of `shared_specs.presets.names()`.
            video_size: `(width, height, frames)` in pixels and frames.
            **arguments: `record_steps` and the `name` of the Flax module, as for the class.
        """
        found = presets.load(preset)
        config = found.config_for(video_size)
        return cls(config=config, warmup_steps=found.warmup_steps, **arguments)

    @nn.compact
    def __call__(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        step: int | Array | None = None,
        cross_attention: bool = False,
        return_lse: bool = False,
        implementation: str | None = None,
    ) -> Array | tuple[Array, Array]:
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
        config = resolve_config(self.config, {})
        checks.check_integer("warmup_steps", self.warmup_steps)
        checks.check_integer("record_steps", self.record_steps)
        checks.check_flag("cross_attention", cross_attention)
        checks.check_flag("return_lse", return_lse)
        checks.check_implementation(implementation, IMPLEMENTATIONS)
        checks.check_qkv(describe("q", q), describe("k", k), describe("v", v))
        step = _checked_step(step)

        if is_cross_attention(q.shape[2], k.shape[2], config, cross_attention):
            return _one_or_pair(_dense(q, k, v, config, False, return_lse))
        if step is None:
            require_step(self.warmup_steps)
        order = TokenOrder.from_config(config, q.shape[2], k.shape[2])
        state = None if step is None else self._layer_state(order, q, k)
        stored = _stored_centroids(state, step)

        def dense(q, k, v, stored):
            kept = tuple(resumed.centroids for resumed in stored)
            ones = jnp.ones(q.shape[:2], jnp.float32)
            return _Called(_dense(q, k, v, config, config.causal, return_lse), ones, kept)

        def sparse(q, k, v, stored):
            return _sparse(q, k, v, stored, order, config, return_lse, implementation)

        if step is None or self.warmup_steps == 0:
            warming_up, called = False, sparse(q, k, v, stored)
        elif isinstance(step, int):
            warming_up = step < self.warmup_steps
            called = (dense if warming_up else sparse)(q, k, v, stored)
        else:
            warming_up = step < self.warmup_steps
            called = lax.cond(warming_up, dense, sparse, q, k, v, stored)

        if state is not None and self.is_mutable_collection(STATE) and not self.is_initializing():
            self._remember(state, called, step, warming_up)
        return _one_or_pair(called.results)

    def _layer_state(self, order: TokenOrder, q: Array, k: Array) -> dict[str, nn.Variable] | None:
        """The variables of this layer; None where the caller carries none."""
        if not (self.is_mutable_collection(STATE) or self.has_variable(STATE, "centroids_step")):
            return None
        state = {"centroids_step": self.variable(STATE, "centroids_step", lambda: jnp.int32(-1))}
        for name, x, count in (
            ("query_centroids", q, order.query_centroids),
            ("key_centroids", k, order.key_centroids),
        ):
            if count is not None:
                shape = (*x.shape[:2], count, x.shape[3])
                state[name] = self.variable(STATE, name, jnp.zeros, shape, jnp.float32)
        if self.record_steps:
            shape = (self.record_steps, q.shape[1])
            state["density"] = self.variable(STATE, "density", jnp.full, shape, NOT_CALLED)
        return state

    def _remember(self, state, called: _Called, step, warming_up) -> None:
        for name, centroids in zip(_clustered(state), called.centroids, strict=True):
            state[name].value = centroids
        # A warm-up step opens a run: whatever was clustered before it belongs to another video.
        state["centroids_step"].value = jnp.where(warming_up, -1, step).astype(jnp.int32)
        if self.record_steps:
            rows = state["density"].value
            density = called.density.mean(0)
            state["density"].value = rows.at[step].set(density, mode="drop")


class _Called(NamedTuple):
    """What one call computed.

    Attributes:
        results: out, and lse if asked for.
        density: float32 `[B, H]`.
        centroids: those of the queries and of the keys, where they are clustered.
    """

    results: tuple[Array, ...]
    density: Array
    centroids: tuple[Array, ...]


def _checked_step(step: Any) -> int | Array | None:
    """A step that is known as a Python integer, whatever it came as.

    Raises:
        TypeError, ValueError: it is no step.
    """
    if step is None:
        return None
    if isinstance(step, (bool, int, np.integer)):
        return checks.check_integer("step", step)
    shape, dtype = getattr(step, "shape", None), getattr(step, "dtype", None)
    if shape != () or dtype is None or not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"step must be an integer or an integer scalar, got {step!r}")
    return step


def _clustered(state: Mapping[str, Any]) -> list[str]:
    return [name for name in ("query_centroids", "key_centroids") if name in state]


def _stored_centroids(state: Mapping[str, nn.Variable] | None, step) -> tuple[Resumed, ...]:
    if state is None:
        return ()
    last = state["centroids_step"].value
    # Centroids of a later step are those of an earlier run.
    warm = (last >= 0) & (last <= step)
    return tuple(Resumed(state[name].value, warm) for name in _clustered(state))


def _sparse(q, k, v, stored, order, config, return_lse, implementation) -> _Called:
    warm = [resumed.warm for resumed in stored][:1]

    def of_shard(q, k, v, *stored):
        resumed = [Resumed(centroids, *warm) for centroids in stored]
        keys = resumed.pop() if resumed else None
        start = Centroids(resumed.pop() if resumed else None, keys)
        q, k, v, order_state = order.apply(q, k, v, centroids=start)
        levels = choose_levels(q, k, config).levels
        attended = sparse_attention(
            q,
            k,
            v,
            levels,
            block_m=config.block_m,
            block_n=config.block_n,
            scale=config.scale,
            is_causal=config.causal,
            rest=config.rest,
            implementation=implementation,
            return_lse=return_lse,
        )
        results = [order.undo(x, order_state) for x in (attended if return_lse else (attended,))]
        candidates = int(candidate_blocks(q.shape[2], k.shape[2], config).sum())
        listed = levels > 0
        cost = (listed / jnp.maximum(levels, 1).astype(jnp.float32)).sum((2, 3))
        cost += (candidates - listed.sum((2, 3))) * config.rest_share
        density = cost / max(1, candidates)
        centroids = [x for x in order_state.centroids if x is not None] if stored else []
        return *results, density, *centroids

    returned = per_shard(of_shard, q, k, v, *(resumed.centroids for resumed in stored))
    results = returned[: 1 + return_lse]
    return _Called(results, returned[len(results)], returned[len(results) + 1 :])


def _dense(q, k, v, config, causal, return_lse) -> tuple[Array, ...]:
    """Dense attention, which is attention with every block at level 1."""
    rows, columns = -(-q.shape[2] // config.block_m), -(-k.shape[2] // config.block_n)
    attended = sparse_attention(
        q,
        k,
        v,
        jnp.ones((*q.shape[:2], rows, columns), jnp.int32),
        block_m=config.block_m,
        block_n=config.block_n,
        scale=config.scale,
        is_causal=causal,
        return_lse=return_lse,
    )
    return attended if return_lse else (attended,)


def _one_or_pair(results: tuple[Array, ...]) -> Array | tuple[Array, ...]:
    return results[0] if len(results) == 1 else results


def density_records(variables: Mapping[str, Any]) -> DensityRecords:
    """The densities that a model's `PSAVideoAttention` layers recorded; this waits for the device.

    Args:
        variables: what `apply(..., mutable=["psa"])` returned, or all variables of the model.

    Returns:
        One record per layer, step and head, by step; a layer is named by its path in the model,
        joined by dots, and numbered where `nn.scan` or `nn.vmap` stacked several.
    """
    layers = sorted(_densities(variables.get(STATE, {}), ()), key=lambda item: _natural(item[0]))
    rows = [
        DensityRecord(layer, step, head, float(value))
        for layer, density in layers
        for step, heads in enumerate(density)
        for head, value in enumerate(heads)
        if value != NOT_CALLED
    ]
    return DensityRecords(sorted(rows, key=lambda record: record.step))


def _densities(tree: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[str, np.ndarray]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _densities(value, (*path, name))
        elif name == "density":
            density = np.asarray(value)
            for place in np.ndindex(density.shape[:-2]):
                yield ".".join((*path, *map(str, place))), density[place]


def _natural(name: str) -> list:
    """Sorts blocks_2 before blocks_10."""
    return [
        (not part.isdigit(), int(part) if part.isdigit() else part)
        for part in re.split(r"(\d+)", name)
        if part
    ]
