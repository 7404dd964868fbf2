"""Configurations by name, one TOML file each in `presets/`: published ones, and `accurate`."""

import dataclasses
from functools import cache

from shared_specs.config import PSAConfig
from shared_specs.preset_files import Divisors, grid_of, names, read

__all__ = ["Divisors", "Preset", "load", "names"]


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
        grid = grid_of(self.name, self.divisors, video_size)
        return self.config if grid is None else dataclasses.replace(self.config, grid=grid)


@cache
def load(name: str) -> Preset:
    """A preset by name.

    Raises:
        ValueError: no preset has this name.
    """
    data = read(name)
    return Preset(name, **{**data, "config": PSAConfig.from_dict(data["config"])})
