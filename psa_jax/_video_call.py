"""One call of a video model's attention, on arrays alone: what both modules of Flax share."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from psa_jax._arrays import check_inputs
from psa_jax._sharding import per_shard, shared_out_like, vary_alike
from psa_jax._switches import numpy_rules
from psa_jax._video_memory import Run
from psa_jax.attention import IMPLEMENTATIONS, sparse_attention
from psa_jax.functional import choose_levels, resolve_config
from psa_jax.order import Centroids, OrderState, Permutation, Resumed, TokenOrder
from shared_specs import checks
from shared_specs.config import PSAConfig
from shared_specs.geometry import cdiv
from shared_specs.selection import candidate_blocks
from shared_specs.video import Phases, is_cross_attention, require_step

KEPT = ("query_order", "query_inverse", "key_order", "key_inverse", "levels")
"""Names of what later steps use again."""

NOT_CALLED = -1.0
"""Stands in the density record of a step that has not been computed."""


class Called(NamedTuple):
    """What one call computed.

    Attributes:
        results: out, and lse if asked for.
        density: float32 `[H]`, the mean over the batch; None: nothing to remember.
        warming_up: whether the step was one of the dense ones.
        run: what the next call begins with; None without memory.
    """

    results: tuple[Array, ...]
    density: Array | None
    warming_up: bool | Array
    run: Run | None

    @property
    def output(self) -> Array | tuple[Array, ...]:
        """out alone, or out and lse."""
        return self.results[0] if len(self.results) == 1 else self.results


class VideoCall(NamedTuple):
    """The checked arguments of a call, before anything is computed.

    Attributes:
        phases: configurations by step; all have the order, blocks and rules of `config`.
        refresh_every: steps for which order and levels are kept.
        order: the token order; None for cross-attention, which has none and no memory.
        step: a Python integer, a traced scalar, or None: no memory.
    """

    q: Array
    k: Array
    v: Array
    config: PSAConfig
    phases: Phases
    warmup_steps: int
    refresh_every: int
    order: TokenOrder | None
    step: int | Array | None
    return_lse: bool
    implementation: str | None

    @classmethod
    def checked(
        cls,
        q: Array,
        k: Array,
        v: Array,
        *,
        config: PSAConfig | None,
        warmup_steps: int,
        refresh_every: int,
        schedule: Mapping[int, Any] | None,
        step: int | Array | None,
        branch: str,
        cross_attention: bool,
        return_lse: bool,
        implementation: str | None,
    ) -> VideoCall:
        """The call, if its arguments fit; errors as `PSAVideoAttention` says."""
        config = resolve_config(config, {})
        checks.check_integer("warmup_steps", warmup_steps)
        checks.check_integer("refresh_every", refresh_every, 1)
        phases = Phases.of(config, schedule, warmup_steps)
        checks.check_flag("cross_attention", cross_attention)
        checks.check_flag("return_lse", return_lse)
        checks.check_implementation(implementation, IMPLEMENTATIONS)
        check_inputs(q, k, v)
        check_branch(branch)
        step = _checked_step(step)
        order = None
        if not is_cross_attention(q.shape[2], k.shape[2], config, cross_attention):
            if step is None:
                require_step(warmup_steps=warmup_steps, refresh_every=refresh_every, phases=phases)
            order = TokenOrder.from_config(config, q.shape[2], k.shape[2])
        return cls(
            q,
            k,
            v,
            config,
            phases,
            warmup_steps,
            refresh_every,
            order,
            step,
            return_lse,
            implementation,
        )

    @property
    def is_remembered(self) -> bool:
        """Whether the call leaves something behind."""
        return self.order is not None and self.step is not None

    def centroids(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the centroids of what the order clusters, by 'query' and 'key'."""
        if self.order is None:
            return {}
        sides = ("query", self.q, self.order.query_centroids), (
            "key", self.k, self.order.key_centroids
        )  # fmt: skip
        return {
            name: (*x.shape[:2], count, x.shape[3]) for name, x, count in sides if count is not None
        }

    def kept(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what later steps use again, by name; orders with what undoes them."""
        if self.refresh_every == 1 or self.order is None:
            return {}
        (batch, heads, length, _), (_, kv_heads, kv_length, _) = self.q.shape, self.k.shape
        found = {}
        if self.order.query_centroids is not None:
            found |= dict.fromkeys(("query_order", "query_inverse"), (batch, heads, length))
        if self.order.key_centroids is not None:
            found |= dict.fromkeys(("key_order", "key_inverse"), (batch, kv_heads, length))
        rows, columns = cdiv(length, self.config.block_m), cdiv(kv_length, self.config.block_n)
        return found | {"levels": (batch, heads, rows, columns)}

    @numpy_rules
    def run(self, memory: Run | None) -> Called:
        """Compute it.

        Args:
            memory: what the branch of this call remembers, or None: k-means starts cold.

        Raises:
            ValueError: what is kept has another shape than this call needs.
        """
        q, k, v, config = self.q, self.k, self.v, self.config
        step: Any = self.step  # is given wherever it is compared
        if self.order is None:
            dense = _dense(q, k, v, config, False, self.return_lse)
            return Called(dense, None, False, None)
        if memory is not None:
            self._check_kept(memory)
            arrays, tree = jax.tree.flatten(memory[3:])
            memory = Run(*memory[:3], *jax.tree.unflatten(tree, shared_out_like(q, arrays)))
            memory = memory.begin(step, self.refresh_every, self.phases)
        works, begins = self._works()
        # A Python integer where the step is one, and where there is one kind of work.
        which = sum((step >= first) * 1 for first in begins[1:])
        if isinstance(which, int):
            returned = works[which](q, k, v, memory)
        else:
            returned = lax.switch(which, works, q, k, v, memory)
        *results, density, memory = returned
        warming_up = step < self.warmup_steps if self.warmup_steps else False
        if memory is not None:
            # A warm-up step opens a run: whatever was chosen before it is another video's.
            memory = memory.reset(warming_up)
        return Called(tuple(results), density.sum(0) / max(1, q.shape[0]), warming_up, memory)

    def _works(self) -> tuple[list[Callable], list[int]]:
        """What steps do, dense warm-up and then a phase each, and the step each begins with."""

        def warm_up(q, k, v, memory):
            results = _dense(q, k, v, self.config, self.config.causal, self.return_lse)
            return *results, jnp.ones_like(q[:, :, 0, 0], jnp.float32), memory

        firsts, configs = self.phases
        used = [
            (max(first, self.warmup_steps), functools.partial(self._sparse, config=config))
            for first, end, config in zip(firsts, (*firsts[1:], math.inf), configs, strict=True)
            if end > self.warmup_steps
        ]
        every = [(0, warm_up), *used] if self.warmup_steps else used
        return [work for _, work in every], [first for first, _ in every]

    def _check_kept(self, memory: Run) -> None:
        for name, shape in self.kept().items():
            if memory.kept[name].shape != shape:
                raise ValueError(
                    f"{name} kept from an earlier step must have shape {shape}, got "
                    f"{memory.kept[name].shape}: start from an empty state for another video, and "
                    "give calls of other shapes a branch of their own"
                )

    def _sparse(self, q, k, v, memory: Run | None, *, config: PSAConfig) -> tuple:
        """out, lse if asked for, densities `[B, H]`, and the memory with what was chosen."""
        order: Any = self.order  # every sparse call has one
        sides = list(self.centroids())
        start, last, kept = ((), (), {}) if memory is None else memory[3:]
        kept = {name: kept[name] for name in self.kept() if name in kept}  # JAX sorts dictionaries

        def of_shard(q, k, v, *flat):
            if memory is not None:
                flags, *flat = flat
                is_warm, chooses = flags.any((0, 1))  # all alike; none in an empty batch
            starts, flat = flat[: len(start)], flat[len(start) :]
            lasts, kept_here = flat[: len(last)], dict(zip(kept, flat[len(last) :], strict=True))
            warm = dict(zip(sides, (Resumed(x, is_warm) for x in starts), strict=False))
            warm = Centroids(warm.get("query"), warm.get("key"))

            def choose(function, keep):
                """`function(q, k)` where the step chooses, otherwise `keep`."""
                if not kept_here:
                    return function(q, k)
                return lax.cond(
                    chooses,
                    lambda: vary_alike(tuple(function(q, k)), q, k),
                    lambda: vary_alike(tuple(keep), q, k),
                )

            def cluster(q, k):
                state = order.choose(q, k, centroids=warm)
                permutations = {"query": state.queries, "key": state.keys}
                chosen = [x for side in sides for x in permutations[side]]
                return *chosen, *(x for x in state.centroids if x is not None)

            orders, left = (), ()
            if sides:
                keep = [x for name, x in kept_here.items() if name != "levels"]
                found = choose(cluster, (*keep, *lasts))
                orders, left = found[: 2 * len(sides)], found[2 * len(sides) :]
                state = _state_of(order, q, orders)
            else:
                state = order.choose(q, k)
            q, k, v = order.move(q, k, v, state)
            (levels,) = choose(
                lambda q, k: (choose_levels(q, k, config).levels,), [kept_here.get("levels")]
            )
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
                implementation=self.implementation,
                return_lse=self.return_lse,
            )
            attended = attended if self.return_lse else (attended,)
            results = [order.undo(x, state) for x in attended]
            density = _densities(levels, q.shape[2], k.shape[2], config)
            left = () if memory is None else left
            return *results, density, *left, *((*orders, levels) if kept_here else ())

        arrays = [*start, *last, *kept.values()]
        if memory is not None:  # scalars travel as every other array does
            flags = jnp.stack([memory.is_warm, memory.chooses])
            arrays.insert(0, jnp.broadcast_to(flags, (*q.shape[:2], 2)))
        returned = per_shard(of_shard, q, k, v, *arrays)
        count = 2 + self.return_lse
        if memory is not None:
            left, chosen = returned[count : count + len(last)], returned[count + len(last) :]
            kept = dict(zip(kept, chosen, strict=True))
            memory = memory._replace(last=tuple(left), kept=kept)
        return *returned[:count], memory


def _state_of(order: TokenOrder, q: Array, arrays: Sequence[Array]) -> OrderState:
    """The state of an order that clusters: order and inverse of the queries, if they are clustered
    apart, and of the keys."""
    keys = Permutation(*arrays[-2:])
    if len(arrays) == 4:
        return OrderState(Permutation(*arrays[:2]), keys)
    return OrderState(keys if order.method == "Clusters" else order._fixed(q), keys)


def _densities(levels: Array, q_len: int, kv_len: int, config: PSAConfig) -> Array:
    """float32 `[B, H]` (specification, section 9)."""
    candidates = int(candidate_blocks(q_len, kv_len, config).sum())
    listed = levels > 0
    cost = (listed / jnp.maximum(levels, 1).astype(jnp.float32)).sum((2, 3))
    cost += (candidates - listed.sum((2, 3), dtype=jnp.float32)) * config.rest_share
    return cost / max(1, candidates)


Memory = dict[str, Array]
"""What one branch of a layer remembers, by name: `centroids_step`, and where something is clustered
`start_is_warm`, `query_start`, `query_centroids`, `key_start` and `key_centroids` (a `Run`); and
`density [record_steps, H]`; with `refresh_every` also `chosen_at` and what is in `KEPT`."""


def new_memory(call: VideoCall, record_steps: int) -> Memory:
    """The memory of a branch before its first call."""
    sides = call.centroids()
    memory = _with_run({}, Run.new(tuple(sides.values()), call.kept()), tuple(sides))
    if record_steps:
        shape = (record_steps, call.q.shape[1])
        memory["density"] = jnp.full(shape, NOT_CALLED, jnp.float32)
    return memory


def call_with(call: VideoCall, memory: Memory | None) -> tuple[Called, Memory | None]:
    """Compute the call, and what its branch remembers then.

    Args:
        memory: what the branch remembers, or None: k-means starts cold.
    """
    if memory is None or not call.is_remembered:
        return call.run(None), None
    sides = tuple(name for name in ("query", "key") if f"{name}_centroids" in memory)
    start, last = (
        tuple(memory[f"{name}_{kind}"] for name in sides) for kind in ("start", "centroids")
    )
    is_warm = memory["start_is_warm"] if sides else jnp.bool_(False)
    step = memory["centroids_step"]
    kept = {name: memory[name] for name in KEPT if name in memory}
    # A warm-up step of another branch ends this one's run by its step alone.
    chosen_at = jnp.where(step < 0, step, memory["chosen_at"]) if kept else step
    called = call.run(Run(step, chosen_at, is_warm, start, last, kept))
    memory = _with_run(memory, called.run, sides)
    if "density" in memory:
        density = memory["density"].at[call.step].set(called.density, mode="drop")
        memory["density"] = density
    return called, memory


def _with_run(memory: Memory, run: Any, sides: tuple[str, ...]) -> Memory:
    memory = {**memory, "centroids_step": run.step, **run.kept}
    if run.kept:
        memory["chosen_at"] = run.chosen_at
    for name, start, last in zip(sides, run.start, run.last, strict=True):
        memory["start_is_warm"] = run.is_warm
        memory[f"{name}_start"], memory[f"{name}_centroids"] = start, last
    return memory


def check_branch(branch: Any) -> None:
    """A branch is a string.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(branch, str):
        raise TypeError(f"branch must be a string, got {branch!r}")


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


def _dense(q, k, v, config, causal, return_lse) -> tuple[Array, ...]:
    """Dense attention, which is attention with every block at level 1."""
    rows, columns = cdiv(q.shape[2], config.block_m), cdiv(k.shape[2], config.block_n)
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
