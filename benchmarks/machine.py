"""The machine a row was measured on."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

_PACKAGES = ("numpy", "torch", "triton", "jax", "jaxlib", "flax")


@functools.cache
def describe(device: str) -> dict[str, Any]:
    """Device, driver, cores, versions and commit, as every row carries them."""
    about: dict[str, Any] = {
        "device": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "commit": _output("git", "rev-parse", "--short", "HEAD"),
    }
    if device == "gpu":
        fields = _output(
            "nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader", "--id=0"
        )
        about["device"], _, about["driver"] = (fields or "unknown GPU").partition(", ")
    return about


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
