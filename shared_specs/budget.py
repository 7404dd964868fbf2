"""Levels under a cost budget, by estimated defect (specification, section 6, `budget`)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from shared_specs.constants import LEVELS


def precision_bits(block_n: int) -> int:
    """Bits of an integer defect: with `lam * block_n` beside it a sum still fits int32."""
    return 30 - int(math.log2(block_n))


def check_budget(config, default_ratios: Mapping) -> None:
    """Raise ValueError unless the fields of a budget in a PSAConfig fit each other and the rest."""
    if not 0 < config.budget <= 1:
        raise ValueError(f"budget must be in (0, 1], got {config.budget}")
    if (config.mask_mode == "budget") != (config.importance == "defect"):
        raise ValueError(
            "mask_mode='budget' and importance='defect' need each other, got "
            f"mask_mode={config.mask_mode!r}, importance={config.importance!r}"
        )
    if config.mask_mode != "budget":
        return
    if config.block_m % config.resolved_sample_m:
        raise ValueError(
            f"sample_m must be a divisor of block_m={config.block_m} with importance='defect', "
            f"got {config.sample_m}"
        )
    if config.mask_ratios != default_ratios:
        raise ValueError(
            "mask_ratios must be left at its default with mask_mode='budget', where budget says "
            f"what levels may cost, got {config.mask_ratios}"
        )
    if config.attn_impl != "new_mask_type":
        raise ValueError(
            "attn_impl must be 'new_mask_type' with mask_mode='budget', got "
            f"attn_impl={config.attn_impl!r}, use_sim_mask={config.use_sim_mask}"
        )


def check_costs(n_q: int, n_k: int, block_n: int) -> None:
    """Raise ValueError unless the costs of a head fit int32."""
    if n_q * n_k * block_n >= 1 << 31:
        raise ValueError(
            "Nq * Nk * block_n must be below 2^31 with mask_mode='budget', got "
            f"{n_q} * {n_k} blocks of {block_n}"
        )


def cost_limits(
    candidates: np.ndarray, n_k: int, block_n: int, budget: float, *, per_row: bool
) -> np.ndarray:
    """W: what a group may cost, in keys, int64 `[Nq, 1]` (`per_row`) or `[1, 1]`.

    Args:
        candidates: int `[Nq]`, of how many blocks the row can see a key.
        n_k: key blocks.
        block_n: keys per block.
        budget: share of the dense cost, in (0, 1].
        per_row: a budget for each row instead of one for all rows of a head.

    Raises:
        ValueError: the budget is not in (0, 1], or costs of a head would not fit int32.
    """
    if not 0 < budget <= 1:
        raise ValueError(f"budget must be in (0, 1], got {budget}")
    check_costs(len(candidates), n_k, block_n)
    n = candidates.astype(np.int64) if per_row else candidates.sum(dtype=np.int64)
    n = n.reshape(-1, 1)
    return np.floor(budget * block_n * n).astype(np.int64)


def options(block_n: int, levels: tuple[int, ...], rest_keys: int) -> list[tuple[int, int, int]]:
    """(level, cost in keys, column of the defect table), coarsest first; column -1 is no defect.

    Raises:
        ValueError: `levels` is not a part of (1, 2, 4, 8) with 1 in it, or `rest_keys` not 0 or 1.
    """
    if 1 not in levels or any(level not in LEVELS for level in levels):
        raise ValueError(f"levels must be a part of {LEVELS} with 1 in it, got {levels}")
    if rest_keys not in (0, 1):
        raise ValueError(f"rest_keys must be 0 (skip) or 1 (mean), got {rest_keys}")
    finer = [(level, block_n // level, LEVELS.index(level) - 1) for level in LEVELS[::-1]]
    return [(0, rest_keys, 3)] + [option for option in finer if option[0] in levels]


def budget_levels(
    defects: np.ndarray,
    candidate: np.ndarray,
    forced: np.ndarray,
    *,
    block_n: int,
    budget: float,
    levels: tuple[int, ...] = LEVELS,
    rest_keys: int = 0,
    per_row: bool = False,
) -> np.ndarray:
    """Levels of least total defect that a budget allows.

    Args:
        defects: float32 `[B, H, Nq, Nk, 4]`, finite and at least 0 or NaN (which counts as 0): what
            seeing the block at level 2, 4, 8 or not at all loses.
        candidate: bool `[Nq, Nk]`, blocks of which the row can see a key; the others get 0.
        forced: bool `[Nq, Nk]`, candidates that get level 1 whatever they cost.
        block_n, budget, per_row: as in `cost_limits`.
        levels: levels that may be chosen; always with 1.
        rest_keys: cost of level 0, in keys: 0 where it skips, 1 where it is seen as one mean.

    Returns:
        int32 `[B, H, Nq, Nk]`, values in {0, 1, 2, 4, 8}.

    Raises:
        ValueError: a defect is negative or infinite, or `cost_limits` or `options` refuses.
    """
    choices = options(block_n, levels, rest_keys)
    if (defects < 0).any() or np.isinf(defects).any():
        raise ValueError("defects must be finite and at least 0, or NaN")
    free = candidate & ~forced
    integers = _integer_defects(defects, free, precision_bits(block_n), per_row)
    fixed = np.where(forced & candidate, block_n, 0)
    limit = cost_limits(candidate.sum(-1), candidate.shape[-1], block_n, budget, per_row=per_row)

    def cost_and_level(lam):
        def total_of(price: int, column: int):
            u = integers[..., column] if column >= 0 else np.zeros(integers.shape[:-1], np.int64)
            return u + lam * price

        (name, price, column), *others = choices
        best = total_of(price, column)
        cost, level = np.full_like(best, price), np.full_like(best, name)
        for name, price, column in others:
            total = total_of(price, column)
            finer = total < best  # of equals the coarsest, which stands first
            best = np.where(finer, total, best)
            cost, level = np.where(finer, price, cost), np.where(finer, name, level)
        cost = np.where(free, cost, fixed)
        return cost.sum(-1 if per_row else (-2, -1), keepdims=True), level

    group = (*defects.shape[:2], defects.shape[2] if per_row else 1, 1)
    low = np.zeros(group, np.int64)
    high = np.full(group, 1 << precision_bits(block_n))
    for _ in range(precision_bits(block_n) + 1):
        middle = (low + high) >> 1
        fits = cost_and_level(middle)[0] <= limit
        low, high = np.where(fits, low, np.minimum(middle + 1, high)), np.where(fits, middle, high)
    level = np.where(free, cost_and_level(high)[1], 0)
    return np.where(forced & candidate, 1, level).astype(np.int32)


def _integer_defects(defects, free, bits: int, per_row: bool) -> np.ndarray:
    """min(floor(D * 2^(bits - x)), 2^bits), `2^x` at or above the group's largest free rest."""
    clean = np.where(np.isnan(defects), 0, defects).astype(np.float64)
    largest = np.where(free, clean[..., 3], 0).max(-1 if per_row else (-2, -1), keepdims=True)
    mantissa, x = np.frexp(largest)
    x = np.where(mantissa == 0.5, x - 1, x)[..., None]  # a power of two is its own bound
    scaled = np.minimum(np.floor(np.ldexp(clean, bits - x)), 1 << bits).astype(np.int64)
    return np.where((largest == 0)[..., None], 0, scaled)
