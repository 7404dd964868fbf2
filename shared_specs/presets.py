"""Published configurations by name, one TOML file each in `presets/`."""

import dataclasses
import tomllib
from functools import cache, lru_cache
from importlib import resources

from shared_specs.config import PSAConfig
from shared_specs.order.checks import check_triple


@dataclasses.dataclass(frozen=True)
class Divisors:
    """Pixels per token across and down, and frames per token."""

    width: int
    height: int
    frames: int

    def grid(self, video_size: tuple[int, int, int]) -> tuple[int, int, int]:
        """`(depth, height, width)` in tokens of a `(width, height, frames)` video, rounded up."""
        width, height, frames = check_triple("video_size", video_size, "(width, height, frames)")
        return -(-frames // self.frames), -(-height // self.height), -(-width // self.width)


@dataclasses.dataclass(frozen=True)
class Preset:
    """A published configuration and what a video model needs beside it.

    Attributes:
        name: as in `names()`.
        description: the model it was published for.
        config: the configuration, without a grid.
        warmup_steps: leading denoising steps with dense attention; see `PSAVideoAttention`.
        divisors: from a video's size to its tokens; None for a model that orders no grid.
    """

    name: str
    description: str
    config: PSAConfig
    warmup_steps: int
    divisors: Divisors | None

    def config_for(self, video_size: tuple[int, int, int] | None) -> PSAConfig:
        """The configuration with the grid of a `(width, height, frames)` video filled in.

        Raises:
            ValueError: the size is not three positive integers, or this preset has no grid.
        """
        if video_size is None:
            return self.config
        if self.divisors is None:
            raise ValueError(
                f"preset {self.name!r} has no video grid: video_size must be None, "
                f"got {video_size!r}"
            )
        return dataclasses.replace(self.config, grid=self.divisors.grid(video_size))


def _folder():
    return resources.files("shared_specs") / "presets"


@lru_cache(maxsize=1)
def names() -> tuple[str, ...]:
    """The names of all presets, sorted."""
    files = (entry.name for entry in _folder().iterdir())
    return tuple(sorted(name.removesuffix(".toml") for name in files if name.endswith(".toml")))


@cache
def load(name: str) -> Preset:
    """A preset by name.

    Raises:
        ValueError: no preset has this name.
    """
    if name not in names():
        raise ValueError(f"preset must be one of {', '.join(names())}; got {name!r}")
    data = tomllib.loads((_folder() / f"{name}.toml").read_text(encoding="utf-8"))
    divisors = data.get("divisors")
    return Preset(
        name=name,
        description=data["description"],
        config=PSAConfig.from_dict(data["config"]),
        warmup_steps=data["warmup_steps"],
        divisors=None if divisors is None else Divisors(**divisors),
    )


def load_preset(name: str, video_size: tuple[int, int, int] | None = None) -> PSAConfig:
    """The configuration of a preset, with the grid of a `(width, height, frames)` video."""
    return load(name).config_for(video_size)
