"""The keywords of the public calls, so that each can say by its flags what it returns."""

from __future__ import annotations

from typing import Required, TypedDict

from jax import Array

from shared_specs.config import PSAConfig
from shared_specs.config_types import ConfigFields


class Overrides(ConfigFields["float | Array | None"], total=False):
    """Fields of `PSAConfig` as keywords."""


class CallArguments(Overrides, total=False):
    """Keywords of `psa_attention` that do not change the kind of result."""

    config: PSAConfig | None
    levels: Array | None
    implementation: str | None
    bias: None
    mask: None
    is_causal: bool


class SparseArguments(TypedDict, total=False):
    """Likewise, of `sparse_attention`."""

    block_m: Required[int]
    block_n: Required[int]
    scale: float | Array | None
    is_causal: bool
    rest: str
    implementation: str | None


class ModuleArguments(TypedDict, total=False):
    """Likewise, of a `PSAAttention`."""

    levels: Array | None
    implementation: str | None


class VideoArguments(TypedDict, total=False):
    """Likewise, of a `PSAVideoAttention`."""

    step: int | Array | None
    branch: str
    cross_attention: bool
    implementation: str | None
