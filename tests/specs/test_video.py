"""Phases of a video run: configurations by step (specification, section 10)."""

import numpy as np
import pytest

from shared_specs import PSAConfig
from shared_specs.video import Phases

BUDGET = PSAConfig(importance="defect", mask_mode="budget", budget=0.2)


def test_a_schedule_replaces_the_budget_from_its_steps_on():
    phases = Phases.of(BUDGET, {12: 0.1, 3: 0.5}, 0)
    assert phases.firsts == (0, 3, 12)
    assert [config.budget for config in phases.configs] == [0.2, 0.5, 0.1]
    assert Phases.of(BUDGET, {0: 0.4}, 0).configs[0].budget == 0.4
    assert Phases.of(BUDGET, None, 7) == ((0,), (BUDGET,))


def test_in_other_modes_it_replaces_the_ratios():
    ratios = {1: (0.0, 0.5)}
    phases = Phases.of(PSAConfig(), {2: ratios}, 0)
    assert dict(phases.configs[1].mask_ratios) == ratios
    assert phases.configs[0] == PSAConfig()


@pytest.mark.parametrize("wrap", [int, np.int32])
def test_where_a_phase_begins(wrap):
    phases = Phases.of(BUDGET, {3: 0.5, 12: 0.1}, 0)
    cases = {(0, 2): False, (2, 3): True, (3, 11): False, (3, 12): True, (12, 40): False}
    for (earlier, later), begins in {**cases, (0, 40): True}.items():
        assert bool(phases.begins_between(wrap(earlier), wrap(later))) == begins


@pytest.mark.parametrize(
    ("error", "message", "config", "schedule"),
    [
        (TypeError, "schedule must be None or map steps to budgets, got 0.5", BUDGET, 0.5),
        (ValueError, "at least one phase", BUDGET, {}),
        (TypeError, "a step of schedule must be an integer, got 1.5", BUDGET, {1.5: 0.5}),
        (ValueError, "a step of schedule must be at least 0, got -1", BUDGET, {-1: 0.5}),
        (ValueError, r"schedule\[3\] must be a budget, with mask_mode='budget'", BUDGET, {3: 1.5}),
        (TypeError, r"schedule\[3\] must be a budget", BUDGET, {3: {1: (0, 1)}}),
        (TypeError, r"schedule\[3\] must be a mask_ratios, with .*'topk'", PSAConfig(), {3: 0.5}),
        (ValueError, r"\[3\] is never used.* step 5, and warmup_steps=6", BUDGET, {3: 0.5, 5: 0.1}),
    ],
)  # fmt: skip
def test_bad_schedules_are_refused(error, message, config, schedule):
    with pytest.raises(error, match=message):
        Phases.of(config, schedule, 6)
