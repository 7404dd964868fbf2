"""The `triton` implementation keeps the contract of every implementation of attention."""

import dataclasses

import numpy as np
import pytest

from tests.torch.attention_contract import (
    ALONE,
    CAUSAL,
    LENGTHS,
    SHAPES,
    AttentionContract,
    Case,
    run,
)


def sampled(cases, step: int):
    """Every `step`-th case in `make test`, the others under `slow`: the interpreter is slow."""
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(case, id=str(case), marks=[pytest.mark.slow] if place % step else [])
            for place, case in enumerate(cases)
        ],
    )


class TestTriton(AttentionContract):
    implementation = "triton"

    def check(self, case, rng):
        super().check(dataclasses.replace(case, batch=1), rng)

    @sampled(SHAPES, 2)
    def test_block_sizes(self, case, rng):
        self.check(case, rng)

    @sampled(LENGTHS, 3)
    def test_any_length(self, case, rng):
        self.check(case, rng)

    @sampled(ALONE, 3)
    def test_one_level_alone_with_every_tail(self, case, rng):
        self.check(case, rng)

    @sampled(CAUSAL, 3)
    def test_causal_with_offset(self, case, rng):
        self.check(case, rng)

    def test_same_bits_on_every_run(self, rng):
        case = Case(batch=1, heads=2, kv_heads=1)
        inputs = case.inputs(rng)
        first, again = (run(inputs, "triton", **case.settings()) for _ in range(2))
        for x, y in zip(first, again, strict=True):
            np.testing.assert_array_equal(x, y)
