"""What the runner asks of a framework."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from benchmarks.workloads import Workload

DENSE, BINARY, GIVEN, WHOLE, PART = "dense", "binary", "levels given", "whole call", "part"


def _itself(x: Any) -> Any:
    return x


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provider:
    """One way to compute attention, or one part of it.

    Attributes:
        name: unique within a device; starts with the framework.
        kind: DENSE, BINARY (a block mask of the same density), GIVEN (pyramid, levels given),
            WHOLE (pyramid, from q, k, v) or PART (one room alone; forward only).
        build: pass -> a callable without arguments that does the work once. Raises ImportError
            or ValueError where the provider cannot run; that is a skip with the reason.
        output: result of the forward callable -> out `[B, H, L, D]`; unused for a PART.
        levels: the mask the provider really uses, dense NumPy; None for DENSE and PART.
        block_n: keys per block of that mask.
    """

    name: str
    kind: str
    build: Callable[[str], Callable[[], Any]]
    output: Callable[[Any], Any] = _itself
    levels: Callable[[], np.ndarray] | None = None
    block_n: int | None = None


class Session(Protocol):
    """A framework with one workload's inputs on the device."""

    workload: Workload

    def providers(self) -> list[Provider]:
        """Dense ones first: the first that runs is what the others' outputs are compared with."""

    def numpy(self, x: Any, heads: list[int]) -> np.ndarray:
        """The given heads of `[B, H, L, D]` as float32 NumPy."""

    def wait(self, x: Any) -> None:
        """Return when `x` has been computed."""

    def times(self, call: Callable[[], Any], repeats: int) -> list[float]:
        """Seconds of each of `repeats` runs, warmed up."""

    def host_seconds(self, call: Callable[[], Any], repeats: int) -> list[float] | None:
        """Seconds until each of `repeats` calls returns with nothing queued before it, while the
        device still works; None where a call returns with its result."""

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        """Most memory held during one run, over what was held before; None if unknown."""
