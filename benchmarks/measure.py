"""Time and peak memory of a call on the host."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def seconds(call: Callable[[], Any]) -> float:
    """Wall-clock time of `call()`."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def host_seconds(call: Callable[[], Any], wait: Callable[[Any], None], repeats: int) -> list[float]:
    """Time until `call()` returns, which may be before its result is there.

    Args:
        call: enqueues the work.
        wait: returns when a result of `call` has been computed; called outside the timed part, so
            that no call waits for a place in the device's queue.
        repeats: timed calls, after one that is not.
    """
    times = []
    wait(call())
    for _ in range(repeats):
        start = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - start)
        wait(result)
    return times


def peak_resident_bytes(call: Callable[[], Any]) -> int | None:
    """Highest resident memory during `call()` over what was resident before it.

    Returns:
        Bytes, or None where the kernel does not let a process reset its own high-water mark
        (anything but Linux with glibc).
    """
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        # The allocator keeps freed pages; a call that reuses them would seem to need none.
        ctypes.CDLL(None).malloc_trim(0)
        reset.write_text("5")
    except (OSError, AttributeError):
        return None
    before = _field(status, "VmRSS")
    call()
    return max(0, _field(status, "VmHWM") - before)


def _field(status: Path, name: str) -> int:
    for line in status.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"{status} has no {name}")
