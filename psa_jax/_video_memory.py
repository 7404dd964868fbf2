"""What the layers of a video model remember from step to step, as arrays."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from shared_specs.video import Phases


class Run(NamedTuple):
    """What one branch of one run remembers.

    Every call of a step starts from `start`, so that calls of one step do not depend on each
    other, and a recomputation clusters as the first pass did.

    Attributes:
        step: int32 scalar, the latest step; -1 before the first.
        chosen_at: int32 scalar, the step that last chose an order and levels; -1 before the first.
        is_warm: boolean scalar, whether `start` counts; otherwise calls that choose start cold.
        start: centroids that such calls start from, those of the queries and of the keys, where
            they are clustered.
        last: the centroids that the latest of them left.
        kept: what it chose, where later steps use it again, by name.
    """

    step: Array
    chosen_at: Array
    is_warm: Array
    start: tuple[Array, ...]
    last: tuple[Array, ...]
    kept: dict[str, Array]

    @classmethod
    def new(cls, shapes: tuple[tuple[int, ...], ...], kept: dict[str, tuple[int, ...]]) -> Run:
        """Before the first call, for centroids and kept arrays of these shapes."""
        nothing = tuple(jnp.zeros(shape, jnp.float32) for shape in shapes)
        none = {name: jnp.zeros(shape, jnp.int32) for name, shape in kept.items()}
        return cls(jnp.int32(-1), jnp.int32(-1), jnp.bool_(False), nothing, nothing, none)

    def begin(self, step: int | Array, refresh_every: int, phases: Phases) -> Run:
        """A call of `step`: what is due is chosen anew, in an earlier step than the last cold."""
        step = jnp.asarray(step, jnp.int32)
        same, later = step == self.step, step > self.step
        due = (self.chosen_at < 0) | (step - self.chosen_at >= refresh_every)
        due |= phases.begins_between(self.chosen_at, step)
        anew = ~same & (~later | due)
        return Run(
            step,
            jnp.where(anew, step, self.chosen_at),
            jnp.where(anew, later & (self.step >= 0), self.is_warm),
            tuple(jnp.where(anew, y, x) for x, y in zip(self.start, self.last, strict=True)),
            self.last,
            self.kept,
        )

    @property
    def chooses(self) -> Array:
        """Whether calls of this step choose, instead of using what an earlier one chose."""
        return self.chosen_at == self.step

    def reset(self, where: bool | Array) -> Run:
        """Before the first call again, where the scalar is true."""
        step, chosen_at = (jnp.where(where, jnp.int32(-1), x) for x in (self.step, self.chosen_at))
        return self._replace(step=step, chosen_at=chosen_at, is_warm=self.is_warm & (step >= 0))
