"""Inputs whose logits are past the range of the arithmetic, and what must come of them."""

from typing import NamedTuple

import torch
from torch import Tensor

from tests.torch.attention_contract import Case, Inputs


class Rows(NamedTuple):
    """Query rows by what they see: logits above the range, undefined ones, none but such as are
    below it, and some such beside ordinary ones."""

    above: int = 3
    undefined: int = 20
    below: int = 37
    partly_below: int = 50


ROWS = Rows()


def past_range(case: Case, rng, *, size: float = 1e20) -> Inputs:
    """Inputs of `case` with such rows in its first query block; every other row is ordinary."""
    inputs = case.inputs(rng)
    q, k = inputs.q, inputs.k
    q[..., :3] = 0
    k[..., :2] = size
    k[..., 2] = 0
    k[:, :, : case.block_n, 2] = size
    q[:, :, ROWS.above, 0] = size
    q[:, :, ROWS.undefined, 0], q[:, :, ROWS.undefined, 1] = size, -size
    q[:, :, ROWS.below, 0] = -size
    q[:, :, ROWS.partly_below, 2] = -size
    return inputs


def ordinary(x: Tensor) -> Tensor:
    """The rows `[B, H, L, ...]` whose logits have a defined softmax, as float64."""
    kept = torch.ones(x.shape[2], dtype=torch.bool)
    kept[list(ROWS[:3])] = False
    return x[:, :, kept].double()


def assert_rule(out: Tensor, lse: Tensor) -> None:
    """Rows past the range are NaN, not zeros, and those with weights of 0 only see nothing."""
    for row in (ROWS.above, ROWS.undefined):
        assert out[:, :, row].isnan().all() and lse[:, :, row].isnan().all()
    assert not out[:, :, ROWS.below].any() and (lse[:, :, ROWS.below] == -torch.inf).all()
