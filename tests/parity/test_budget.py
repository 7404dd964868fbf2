"""The budget rule: its bisection against a search through all lambda, and three houses alike."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import psa_jax.budget
import psa_torch.budget
from shared_specs import budget as rule

KINDS = ("random", "ties", "zeros", "equal", "huge", "nan", "tiny", "above-rest")


def table(kind: str, rng, n_q: int, n_k: int) -> np.ndarray:
    """Defects `[2, 2, Nq, Nk, 4]`, mostly rising from level to level."""
    x = np.sort(rng.random((2, 2, n_q, n_k, 4)), -1)
    if kind == "ties":
        x = np.floor(x * 4) / 4
    if kind == "zeros":
        x = x * 0
    if kind == "equal":
        x = x * 0 + 0.3
    if kind == "huge":
        x = x * 2.0 ** rng.integers(-100, 100, x.shape)
    if kind == "nan":
        x[rng.random(x.shape) < 0.2] = np.nan
    if kind == "tiny":
        x = x * 1e-42
    if kind == "above-rest":
        x = x[..., ::-1]
    return np.ascontiguousarray(x, np.float32)


def places(rng, n_q: int, n_k: int) -> tuple[np.ndarray, np.ndarray]:
    candidate = np.arange(n_k) <= np.arange(n_q)[:, None] + n_k // 2
    return candidate, candidate & (rng.random((n_q, n_k)) < 0.1)


def everywhere(x, candidate, forced, per_row, **settings) -> list[np.ndarray]:
    block_n, budget = settings["block_n"], settings.pop("budget")
    expected = rule.budget_levels(x, candidate, forced, per_row=per_row, budget=budget, **settings)
    limit = rule.cost_limits(
        candidate.sum(-1), candidate.shape[1], block_n, budget, per_row=per_row
    ).astype(np.int32)
    given = (x, candidate, forced, limit)
    in_torch = psa_torch.budget.budget_levels(*map(torch.from_numpy, given), **settings)
    in_jax = psa_jax.budget.budget_levels(*map(jnp.asarray, given), **settings)
    return [expected, in_torch.numpy(), np.asarray(in_jax)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block_n", [32, 64, 128])
@pytest.mark.parametrize("per_row", [False, True])
def test_same_levels_in_every_house(kind, block_n, per_row, rng):
    x = table(kind, rng, 5, 12)
    candidate, forced = places(rng, 5, 12)
    for levels, rest_keys in (((1, 2, 4, 8), 1), ((1,), 0), ((1, 4), 0)):
        settings = {"block_n": block_n, "levels": levels, "rest_keys": rest_keys, "budget": 0.3}
        expected, *others = everywhere(x, candidate, forced, per_row, **settings)
        for found in others:
            assert found.dtype == np.int32
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("rest_keys", [0, 1])
def test_lambda_is_the_least_that_fits(kind, per_row, rest_keys, rng, monkeypatch):
    """With few bits every lambda can be tried one after the other."""
    monkeypatch.setattr(rule, "precision_bits", lambda block_n: 6)
    x = table(kind, rng, 4, 9)
    candidate, forced = places(rng, 4, 9)
    settings = {"block_n": 32, "budget": 0.3, "rest_keys": rest_keys, "per_row": per_row}
    found = rule.budget_levels(x, candidate, forced, **settings)
    free = candidate & ~forced
    groups = [[i] for i in range(4)] if per_row else [list(range(4))]
    for b, h in np.ndindex(2, 2):
        for rows in groups:
            expected = _searched(x[b, h, rows], candidate[rows], free[rows], rest_keys)
            np.testing.assert_array_equal(found[b, h, rows], expected)


def _searched(x, candidate, free, rest_keys: int) -> np.ndarray:
    """Levels of one group: every block by its own loop, every lambda from 0 up."""
    x = np.nan_to_num(x, nan=0.0).astype(float)
    largest = max([x[at][3] for at in zip(*np.nonzero(free), strict=True)], default=0.0)
    power = 2.0**-200
    while power < largest:
        power *= 2
    costs = [rest_keys, 4, 8, 16, 32]
    allowed, before = int(0.3 * 32 * candidate.sum()), None
    for lam in range(65):
        levels, spent = np.where(candidate, 1, 0), 32 * int((candidate & ~free).sum())
        for at in zip(*np.nonzero(free), strict=True):
            u = [min(int(d / power * 64), 64) if largest else 0 for d in x[at]]
            totals = [d + lam * c for d, c in zip([u[3], u[2], u[1], u[0], 0], costs, strict=True)]
            best = totals.index(min(totals))  # the first, that is the coarsest
            levels[at] = (0, 8, 4, 2, 1)[best]
            spent += costs[best]
        assert before is None or spent <= before, "the cost must not rise with lambda"
        before = spent
        if spent <= allowed:
            return levels
    return levels


@pytest.mark.parametrize("levels, rest_keys", [((2, 4), 0), ((1, 3), 0), ((1,), 2)])
def test_refuses(levels, rest_keys, rng):
    flags = np.ones((2, 3), bool)
    with pytest.raises(ValueError, match="levels must|rest_keys must"):
        rule.budget_levels(
            table("random", rng, 2, 3),
            flags,
            ~flags,
            block_n=64,
            budget=0.2,
            levels=levels,
            rest_keys=rest_keys,
        )


@pytest.mark.parametrize(
    "shape, budget, said",
    [((2, 3), 0.0, "budget"), ((2, 3), 1.5, "budget"), ((8192, 4096), 0.1, "Nq")],
)
def test_limits_refuse(shape, budget, said):
    with pytest.raises(ValueError, match=said):
        rule.cost_limits(np.full(shape[0], shape[1]), shape[1], 64, budget, per_row=False)
