"""Which of several ways to do a thing runs, and saying so once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import NamedTuple

from shared_specs.checks import check_implementation


class Announcer:
    """Says each thing once through a logger.

    Args:
        name: of the logger.
    """

    def __init__(self, name: str):
        self._logger = logging.getLogger(name)
        self._said: set[tuple[str, ...]] = set()

    def __call__(self, message: str, *args: str, level: int = logging.INFO) -> None:
        """Log `message % args`, unless that has been said."""
        if (message, *args) not in self._said:
            self._said.add((message, *args))
            self._logger.log(level, message, *args)

    def forget(self) -> None:
        """Say everything once more."""
        self._said.clear()


class Choice(NamedTuple):
    """What runs.

    Attributes:
        name: of the candidate.
        passed_over: why the better ones cannot, each by its name; empty if there is none.
    """

    name: str
    passed_over: str


def choose(
    name: str | None, candidates: Collection[str], reason_against: Callable[[str], str | None]
) -> Choice:
    """The candidate of that name, or the best that can run.

    Args:
        name: one of `candidates`, used or refused; None for the first that can run.
        candidates: names, best first.
        reason_against: why a candidate cannot run on the input at hand, or None if it can.

    Raises:
        ValueError: the name is unknown, or what was chosen cannot run.
    """
    check_implementation(name, candidates)
    passed_over = []
    for candidate in candidates if name is None else (name,):
        against = reason_against(candidate)
        if against is None:
            return Choice(candidate, "; ".join(passed_over))
        passed_over.append(f"{candidate} cannot run: {against}")
    raise ValueError(
        f"implementation {candidate!r} cannot run on this input: {against}. "
        f"implementation=None picks one that can, if any of "
        f"{', '.join(map(repr, candidates))} does"
    )
