"""How a configuration passes through custom operators and `torch.compile`: as its JSON text.

An operator takes numbers, strings and tensors, not a `PSAConfig`; and `torch.compile` with
dynamic shapes makes symbols of the numbers it reads from an object. A string stays a constant,
and so does what is computed from it.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from shared_specs.config import PSAConfig, check_config


class Settings(NamedTuple):
    """The fields of a configuration that a call reads itself, and the whole of it as text.

    A `shared_specs.config_types.CallConfig`, as a `PSAConfig` is.
    """

    block_m: int
    block_n: int
    mask_mode: str
    attn_impl: str
    use_sim_mask: bool
    causal: bool
    rest: str
    scale: float | None
    rearrange_method: str | None
    grid: tuple[int, int, int] | None
    tile_size: tuple[int, int, int] | None
    text_length: int
    text_position: str
    json: str

    def to_json(self) -> str:
        """The configuration in full, as operators take it."""
        return self.json


def settings_of(config: PSAConfig | None, overrides: Mapping[str, Any]) -> Settings:
    """Settings of `config` (the default one if None) with `overrides` in place.

    Raises:
        TypeError: `config` is not a PSAConfig, or an override is not one of its fields.
        ValueError: the result is not a valid configuration.
    """
    config = check_config(config)
    if not overrides:
        return Settings(*_constants(config.to_json()))
    return Settings(*_constants(_override(config.to_json(), tuple(overrides.items()))))


@functools.lru_cache(maxsize=256)
def parse_config(text: str) -> PSAConfig:
    """The inverse of `config.to_json()`."""
    return PSAConfig.from_json(text)


@torch.compiler.assume_constant_result
def _constants(text: str) -> tuple:
    return _kept_constants(text)


@functools.lru_cache(maxsize=256)
def _kept_constants(text: str) -> tuple:
    config = parse_config(text)
    return (*(getattr(config, name) for name in Settings._fields[:-1]), text)


@torch.compiler.assume_constant_result
def _override(text: str, overrides: tuple) -> str:
    # What compares equal need not be accepted alike, as True and 1: `typed` tells values apart,
    # but not what is inside them.
    if all(type(value) in (bool, int, float, str, type(None)) for _, value in overrides):
        return _kept_override(text, **dict(overrides))
    return _new_override(text, **dict(overrides))


def _new_override(text: str, /, **overrides) -> str:
    fields = [field.name for field in dataclasses.fields(PSAConfig)]
    unknown = [name for name in overrides if name not in fields]
    if unknown:
        raise TypeError(f"unknown arguments {unknown}; configuration fields: {', '.join(fields)}")
    return dataclasses.replace(parse_config(text), **overrides).to_json()


_kept_override = functools.lru_cache(maxsize=256, typed=True)(_new_override)
