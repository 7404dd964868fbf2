"""Which heads each device computes when one sequence is spread over several of them."""

from __future__ import annotations

import dataclasses

from shared_specs.checks import check_integer


@dataclasses.dataclass(frozen=True)
class HeadPlan:
    """Rows of every rank, a row being one head of one batch entry, `batch_entry * heads + head`.

    Attributes:
        q_rows: the query rows of each rank, one range after the other; together all of them.
        kv_rows: the key/value rows of each rank. Where there are fewer of those than ranks,
            several ranks have the same one, each with a part of its query heads.
    """

    q_rows: tuple[range, ...]
    kv_rows: tuple[range, ...]

    @property
    def shares_keys(self) -> bool:
        """Whether any key/value row is on more than one rank."""
        return sum(map(len, self.kv_rows)) > self.kv_rows[-1].stop


def head_plan(batch: int, heads: int, kv_heads: int, world: int) -> HeadPlan:
    """Rows of batch entries and heads over `world` ranks.

    A unit is one key/value head of one batch entry with its query heads. Ranks get units that
    stand side by side, in numbers that differ by one at most. With fewer units than ranks each
    unit goes to `world / units` ranks, which share its query heads evenly.

    Raises:
        TypeError, ValueError: an argument is no integer of at least 1, `kv_heads` does not divide
            `heads`, or there are fewer units than ranks and they do not divide.
    """
    for name, value in (
        ("batch", batch),
        ("heads", heads),
        ("kv_heads", kv_heads),
        ("world", world),
    ):
        check_integer(name, value, 1)
    if heads % kv_heads:
        raise ValueError(f"heads must be a multiple of kv_heads ({kv_heads}), got {heads}")
    units, group = batch * kv_heads, heads // kv_heads
    split = 1
    if units < world:
        split = world // units
        if world % units or group % split:
            raise ValueError(
                f"world: {world} ranks cannot share {units} key/value heads (batch included) of "
                f"{group} query heads each; use a number of ranks up to {units}, or a multiple of "
                f"it by a divisor of {group}"
            )
    per = group // split
    bounds = [units * split * rank // world for rank in range(world + 1)]
    spans = list(zip(bounds, bounds[1:], strict=False))
    return HeadPlan(
        q_rows=tuple(range(start * per, stop * per) for start, stop in spans),
        kv_rows=tuple(range(start // split, (stop - 1) // split + 1) for start, stop in spans),
    )
