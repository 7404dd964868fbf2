"""One call of a video model's attention, on arrays alone: what both modules of Flax share."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from psa_jax._arrays import describe
from psa_jax._sharding import per_shard
from psa_jax._switches import numpy_rules
from psa_jax.attention import IMPLEMENTATIONS, sparse_attention
from psa_jax.functional import choose_levels, resolve_config
from psa_jax.order import Centroids, Resumed, TokenOrder
from shared_specs import checks
from shared_specs.config import PSAConfig
from shared_specs.geometry import cdiv
from shared_specs.selection import candidate_blocks
from shared_specs.video import is_cross_attention, require_step


class Run(NamedTuple):
    """Centroids of one branch of one run.

    Every call of a step starts from `start`, so that calls of one step do not depend on each
    other, and a recomputation clusters as the first pass did.

    Attributes:
        step: int32 scalar, the latest step; -1 before the first.
        is_warm: boolean scalar, whether `start` counts; otherwise calls of the step start cold.
        start: what calls of the step start from, those of the queries and of the keys, where they
            are clustered.
        last: what its latest call left.
    """

    step: Array
    is_warm: Array
    start: tuple[Array, ...]
    last: tuple[Array, ...]

    @classmethod
    def new(cls, shapes: tuple[tuple[int, ...], ...]) -> Run:
        """Before the first call, for centroids of these shapes."""
        nothing = tuple(jnp.zeros(shape, jnp.float32) for shape in shapes)
        return cls(jnp.int32(-1), jnp.bool_(False), nothing, nothing)

    def begin(self, step: int | Array) -> Run:
        """A call of `step`: a later one starts where the last one ended, an earlier one anew."""
        step = jnp.asarray(step, jnp.int32)
        same, later = step == self.step, step > self.step
        return Run(
            step,
            jnp.where(same, self.is_warm, later & (self.step >= 0)),
            tuple(jnp.where(same, x, y) for x, y in zip(self.start, self.last, strict=True)),
            self.last,
        )

    def reset(self, where: bool | Array) -> Run:
        """Before the first call again, where the scalar is true."""
        step = jnp.where(where, jnp.int32(-1), self.step)
        return self._replace(step=step, is_warm=self.is_warm & (step >= 0))


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
        order: the token order; None for cross-attention, which has none and no memory.
        step: a Python integer, a traced scalar, or None: no memory.
    """

    q: Array
    k: Array
    v: Array
    config: PSAConfig
    warmup_steps: int
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
        step: int | Array | None,
        branch: str,
        cross_attention: bool,
        return_lse: bool,
        implementation: str | None,
    ) -> VideoCall:
        """The call, if its arguments fit; errors as `PSAVideoAttention` says."""
        config = resolve_config(config, {})
        checks.check_integer("warmup_steps", warmup_steps)
        checks.check_flag("cross_attention", cross_attention)
        checks.check_flag("return_lse", return_lse)
        checks.check_implementation(implementation, IMPLEMENTATIONS)
        checks.check_qkv(describe("q", q), describe("k", k), describe("v", v))
        check_branch(branch)
        step = _checked_step(step)
        order = None
        if not is_cross_attention(q.shape[2], k.shape[2], config, cross_attention):
            if step is None:
                require_step(warmup_steps=warmup_steps, refresh_every=1)
            order = TokenOrder.from_config(config, q.shape[2], k.shape[2])
        return cls(q, k, v, config, warmup_steps, order, step, return_lse, implementation)

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

    @numpy_rules
    def run(self, memory: Run | None) -> Called:
        """Compute it.

        Args:
            memory: what the branch of this call remembers, or None: k-means starts cold.
        """
        q, k, v, config, step = self.q, self.k, self.v, self.config, self.step
        if self.order is None:
            dense = _dense(q, k, v, config, False, self.return_lse)
            return Called(dense, None, False, None)
        memory = None if step is None or memory is None else memory.begin(step)
        stored = () if memory is None else memory.start

        def warm_up(q, k, v, *stored):
            ones = jnp.ones(q.shape[:2], jnp.float32)
            return *_dense(q, k, v, config, config.causal, self.return_lse), ones, *stored

        def sparse(q, k, v, *stored):
            return self._sparse(q, k, v, stored, None if memory is None else memory.is_warm)

        warming_up = False
        if step is None or self.warmup_steps == 0:
            returned = sparse(q, k, v, *stored)
        elif isinstance(step, int):
            warming_up = step < self.warmup_steps
            returned = (warm_up if warming_up else sparse)(q, k, v, *stored)
        else:
            warming_up = step < self.warmup_steps
            returned = lax.cond(warming_up, warm_up, sparse, q, k, v, *stored)
        count = 1 + self.return_lse
        results, density, last = returned[:count], returned[count], returned[count + 1 :]
        if memory is not None:
            # A warm-up step opens a run: whatever was clustered before it is another video's.
            memory = memory._replace(last=tuple(last)).reset(warming_up)
        return Called(tuple(results), density.mean(0), warming_up, memory)

    def _sparse(self, q, k, v, stored, is_warm) -> tuple[Array, ...]:
        config, order = self.config, self.order
        assert order is not None  # cross-attention is dense

        def of_shard(q, k, v, *stored):
            resumed = [Resumed(centroids, is_warm) for centroids in stored]
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
                implementation=self.implementation,
                return_lse=self.return_lse,
            )
            attended = attended if self.return_lse else (attended,)
            results = [order.undo(x, order_state) for x in attended]
            candidates = int(candidate_blocks(q.shape[2], k.shape[2], config).sum())
            listed = levels > 0
            cost = (listed / jnp.maximum(levels, 1).astype(jnp.float32)).sum((2, 3))
            cost += (candidates - listed.sum((2, 3), dtype=jnp.float32)) * config.rest_share
            density = cost / max(1, candidates)
            centroids = [x for x in order_state.centroids if x is not None] if stored else []
            return *results, density, *centroids

        return per_shard(of_shard, q, k, v, *stored)


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
