"""Levels under a cost budget, by estimated defect (specification, section 6, `budget`)."""

import torch
from torch import Tensor

from shared_specs.budget import options, precision_bits
from shared_specs.constants import LEVELS


def budget_levels(
    defects: Tensor,
    candidate: Tensor,
    forced: Tensor,
    limit: Tensor,
    *,
    block_n: int,
    levels: tuple[int, ...] = LEVELS,
    rest_keys: int = 0,
) -> Tensor:
    """Levels of least total defect that a budget allows, without host synchronisation.

    Args:
        defects: float32 `[B, H, Nq, Nk, 4]`, finite and at least 0 or NaN (which counts as 0):
            what seeing the block at level 2, 4, 8 or not at all loses.
        candidate: bool `[Nq, Nk]`, blocks of which the row can see a key; the others get 0.
        forced: bool `[Nq, Nk]`, candidates that get level 1 whatever they cost.
        limit: int32 `[Nq, 1]` (a budget for each row) or `[1, 1]` (for each head), from
            `shared_specs.budget.cost_limits`.
        block_n, levels, rest_keys: as in `shared_specs.budget.budget_levels`.

    Returns:
        int32 `[B, H, Nq, Nk]`, values in {0, 1, 2, 4, 8}.

    Raises:
        ValueError: `levels` or `rest_keys` is not accepted.
    """
    choices = options(block_n, levels, rest_keys)
    bits = precision_bits(block_n)
    # A single row is a head of its own: both readings of [1, 1] are then the same group.
    dims = (-1,) if limit.shape[0] == defects.shape[2] else (-2, -1)
    forced = forced & candidate
    free = candidate & ~forced
    integers = _integer_defects(defects, free, bits, dims)
    fixed = forced.int() * block_n

    def cost_and_level(lam):
        def total_of(price: int, column: int):
            total = lam * price + (integers[..., column] if column >= 0 else 0)
            return total.expand(defects.shape[:-1])

        (name, price, column), *others = choices
        best = total_of(price, column)
        cost, level = torch.full_like(best, price), torch.full_like(best, name)
        for name, price, column in others:
            total = total_of(price, column)
            finer = total < best  # of equals the coarsest, which stands first
            best = torch.where(finer, total, best)
            cost, level = torch.where(finer, price, cost), torch.where(finer, name, level)
        cost = torch.where(free, cost, fixed)
        return cost.sum(dims, keepdim=True, dtype=torch.int32), level

    group = (*defects.shape[:2], limit.shape[0], 1)
    low = torch.zeros(group, dtype=torch.int32, device=defects.device)
    high = torch.full_like(low, 1 << bits)
    for _ in range(bits + 1):
        middle = (low + high) >> 1
        fits = cost_and_level(middle)[0] <= limit
        low = torch.where(fits, low, torch.minimum(middle + 1, high))
        high = torch.where(fits, middle, high)
    level = torch.where(free, cost_and_level(high)[1], 0)
    return torch.where(forced, 1, level).int()


def _integer_defects(defects: Tensor, free: Tensor, bits: int, dims: tuple[int, ...]) -> Tensor:
    """min(floor(D * 2^(bits - x)), 2^bits) from the bits of float32 alone, in int32."""
    raw = defects.masked_fill(defects.isnan(), 0).contiguous().view(torch.int32).clamp(min=0)
    top = (raw[..., 3] * free).amax(dims, keepdim=True)[..., None]
    mantissa, exponent = _split(raw)
    top_mantissa, top_exponent = _split(top)
    # Bits of (top mantissa - 1): the least n with 2^n >= top mantissa; exact below 2^24.
    _, width = torch.frexp((top_mantissa - 1).clamp(min=0).float())
    shift = exponent - top_exponent - width + bits
    most = ((1 << bits) >> shift.clamp(0, 30)).clamp(min=1)
    left = torch.where(mantissa >= most, 1 << bits, mantissa << shift.clamp(0, 30))
    scaled = torch.where(shift >= 0, left, mantissa >> (-shift).clamp(0, 31))
    scaled = scaled.clamp(max=1 << bits)
    return torch.where((top == 0) | (mantissa == 0), 0, scaled).int()


def _split(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Mantissa and exponent: the number is mantissa * 2^(exponent - 150)."""
    stored = raw >> 23
    return (raw & 0x7FFFFF) | ((stored > 0).int() << 23), stored.clamp(min=1)
