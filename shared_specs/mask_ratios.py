"""Which share of a row gets which level: ranges of a configuration (specification, section 6)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from shared_specs.checks import check_number
from shared_specs.constants import MASK_LEVELS


class MaskRatios(Mapping[int, tuple[float, float]]):
    """Immutable, hashable mapping from a level to its (start, end) share of a row."""

    __slots__ = ("_items",)

    def __init__(self, ratios: Mapping[int, tuple[float, float]]):
        self._items = tuple((level, ratios[level]) for level in MASK_LEVELS if level in ratios)

    def __getitem__(self, level: int) -> tuple[float, float]:
        for key, value in self._items:
            if key == level:
                return value
        raise KeyError(level)

    def __iter__(self) -> Iterator[int]:
        return (key for key, _ in self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(self._items)

    def __repr__(self) -> str:
        return repr(dict(self._items))


DEFAULT_MASK_RATIOS = MaskRatios(
    {1: (0.0, 0.1), 2: (0.1, 0.15), 4: (0.15, 0.15), 8: (0.15, 0.35), 0: (0.35, 1.0)}
)


def check_ratios(ratios: Any) -> MaskRatios:
    """`ratios` as they are kept; levels may be text, as JSON and TOML have them.

    Raises:
        TypeError: it is no mapping from levels to pairs of numbers.
        ValueError: a level is none, or the ranges do not follow one another from 0 to at most 1.
    """
    if not isinstance(ratios, Mapping) or not ratios:
        raise TypeError(f"mask_ratios must map levels to (start, end), got {ratios!r}")
    clean: dict[int, tuple[float, float]] = {}
    for key, bounds in ratios.items():
        level = int(key) if isinstance(key, str) and key in map(str, MASK_LEVELS) else key
        if isinstance(level, bool) or level not in MASK_LEVELS:
            raise ValueError(f"mask_ratios has level {key!r}; accepted: 0, 1, 2, 4, 8")
        if level in clean:
            raise ValueError(f"mask_ratios names level {level} twice")
        if isinstance(bounds, (str, bytes)) or not hasattr(bounds, "__len__") or len(bounds) != 2:
            raise TypeError(f"mask_ratios[{level}] must be (start, end), got {bounds!r}")
        start, end = (check_number(f"mask_ratios[{level}]", bound) for bound in bounds)
        clean[level] = start, end
    last = 0.0
    for level, end in taken_order(clean):
        start = clean[level][0]
        if start != last or not start <= end <= 1.0:
            raise ValueError(
                f"mask_ratios[{level}] = ({start}, {end}) is out of order: taken by increasing "
                f"end, each range starts where the last one ended ({last}), does not decrease, "
                "and ends at 1 or below"
            )
        last = end
    return MaskRatios(clean)


def taken_order(ratios: Mapping[int, tuple[float, float]]) -> tuple[tuple[int, float], ...]:
    """(level, end) in the order in which selection takes them (section 6)."""
    ends = ((level, ratios[level][1]) for level in MASK_LEVELS if level in ratios)
    return tuple(sorted(ends, key=lambda item: item[1]))  # stable: ties keep 1, 2, 4, 8, 0
