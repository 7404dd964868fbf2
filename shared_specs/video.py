"""What the video attention modules of both frameworks decide alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from shared_specs.checks import check_integer
from shared_specs.config import PSAConfig


class Phases(NamedTuple):
    """Configurations by step (specification, section 10).

    Attributes:
        firsts: the step that each phase begins with, ascending from 0.
        configs: the configuration of each.
    """

    firsts: tuple[int, ...]
    configs: tuple[PSAConfig, ...]

    @classmethod
    def of(cls, config: PSAConfig, schedule: Mapping[int, Any] | None, warmup_steps: int) -> Phases:
        """The phases that a schedule makes of a configuration.

        Args:
            config: what holds before the first step of the schedule.
            schedule: first step of a phase -> its `budget` where `config.mask_mode` is 'budget',
                else its `mask_ratios`; None: one phase.
            warmup_steps: dense steps, in which no phase counts.

        Raises:
            TypeError: it is no mapping of steps.
            ValueError: it is empty, a value is not accepted, or all steps of a phase are dense.
        """
        if schedule is None:
            return cls((0,), (config,))
        if not isinstance(schedule, Mapping):
            raise TypeError(f"schedule must be None or map steps to budgets, got {schedule!r}")
        if not schedule:
            raise ValueError(f"schedule must have at least one phase, got {schedule!r}")
        field = "budget" if config.mask_mode == "budget" else "mask_ratios"
        found = {0: config}
        for step in sorted(check_integer("a step of schedule", step) for step in schedule):
            try:
                found[step] = dataclasses.replace(config, **{field: schedule[step]})
            except (TypeError, ValueError) as error:
                raise type(error)(
                    f"schedule[{step}] must be a {field}, with mask_mode={config.mask_mode!r}: "
                    f"{error}"
                ) from error
        firsts = tuple(found)
        for first, following in zip(firsts, firsts[1:], strict=False):
            if first in schedule and following <= warmup_steps:
                raise ValueError(
                    f"schedule[{first}] is never used: the next phase begins with step "
                    f"{following}, and warmup_steps={warmup_steps}"
                )
        return cls(firsts, tuple(found.values()))

    def begins_between(self, earlier: Any, later: Any) -> Any:
        """Whether another phase holds at step `later` than at `earlier`; arrays are taken too."""
        found = False
        for first in self.firsts[1:]:
            found = found | ((earlier < first) & (first <= later))
        return found


def require_step(*, warmup_steps: int, refresh_every: int, phases: Phases) -> None:
    """Refuse a call without a step where the step decides what is done.

    Raises:
        ValueError: there are warm-up steps, steps that keep what another one chose, or phases.
    """
    reasons = []
    if warmup_steps:
        reasons.append(f"warmup_steps={warmup_steps}")
    if refresh_every > 1:
        reasons.append(f"refresh_every={refresh_every}")
    if len(phases.firsts) > 1:
        reasons.append(f"a schedule of {len(phases.firsts)} phases")
    if reasons:
        raise ValueError(
            f"step must be given with {' and '.join(reasons)}; got None, and the number of calls "
            "says nothing about the step"
        )


def is_cross_attention(q_len: int, kv_len: int, config: PSAConfig, stated: bool) -> bool:
    """Whether a call is cross-attention, which stays dense.

    It is where the caller says so, and where keys and queries differ in number; but causal calls
    with more keys than queries look at their own past.
    """
    return stated or (q_len != kv_len and not config.causal)
