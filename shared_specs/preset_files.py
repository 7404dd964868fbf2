"""The files of the presets: what each holds, and the grid it gives a video."""

import dataclasses
import tomllib
from functools import cache, lru_cache
from importlib import resources
from typing import Any

from shared_specs.checks import check_triple
from shared_specs.geometry import cdiv


@dataclasses.dataclass(frozen=True)
class Divisors:
    """Pixels per token across and down, and frames per token."""

    width: int
    height: int
    frames: int

    def grid(self, video_size: tuple[int, int, int]) -> tuple[int, int, int]:
        """`(depth, height, width)` in tokens of a `(width, height, frames)` video, rounded up."""
        width, height, frames = check_triple("video_size", video_size, "(width, height, frames)")
        return cdiv(frames, self.frames), cdiv(height, self.height), cdiv(width, self.width)


def _folder():
    return resources.files(__package__ or "") / "presets"  # also where the package has another name


@lru_cache(maxsize=1)
def names() -> tuple[str, ...]:
    """The names of all presets, sorted."""
    files = (entry.name for entry in _folder().iterdir())
    return tuple(sorted(name.removesuffix(".toml") for name in files if name.endswith(".toml")))


@cache
def _text(name: str) -> str:
    if name not in names():
        raise ValueError(f"preset must be one of {', '.join(names())}; got {name!r}")
    return (_folder() / f"{name}.toml").read_text(encoding="utf-8")


def read(name: str) -> dict[str, Any]:
    """`description`, `config` (fields of a PSAConfig), `warmup_steps`, `divisors` or None.

    Raises:
        ValueError: no preset has this name.
    """
    data = tomllib.loads(_text(name))
    divisors = data.get("divisors")
    return {**data, "divisors": None if divisors is None else Divisors(**divisors)}


def grid_of(
    name: str, divisors: Divisors | None, video_size: tuple[int, int, int] | None
) -> tuple[int, int, int] | None:
    """The grid that the preset `name` gives a `(width, height, frames)` video; None without one.

    Raises:
        ValueError: the size is not three positive integers, or this preset has no grid.
    """
    if video_size is None:
        return None
    if divisors is None:
        raise ValueError(
            f"preset {name!r} has no video grid: video_size must be None, got {video_size!r}"
        )
    return divisors.grid(video_size)
