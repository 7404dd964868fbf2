"""Configurations as type checkers see them: the fields as keywords, and what a call reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, Protocol, TypedDict, TypeVar

Scale = TypeVar("Scale")


class ConfigFields(TypedDict, Generic[Scale], total=False):
    """The fields of `PSAConfig` as keyword arguments, none of them needed.

    `Scale` is what the package takes for `scale`: an array of its own as well as a number.
    """

    block_m: int
    block_n: int
    tile_n: int
    mask_ratios: Mapping[int, tuple[float, float]]
    mask_mode: str
    budget: float
    budget_levels: tuple[int, ...]
    budget_scope: str
    rest: str
    attn_impl: str
    use_sim_mask: bool
    sim_2x_threshold: float
    sim_4x_threshold: float
    sim_8x_threshold: float
    rearrange_method: str | None
    causal: bool
    scale: Scale
    min_full_ratio: float
    importance: str
    importance_pool: int
    sample_m: int | None
    sample_n: int | None
    sample_seed: int
    antidiagonal_stride: int
    sink_blocks: int
    text_length: int
    text_position: str
    grid: tuple[int, int, int] | None
    tile_size: tuple[int, int, int] | None


class CallConfig(Protocol):
    """What a call reads of a configuration itself, and the whole of it as text.

    A `PSAConfig` is one; so is what stands in for it where a program is compiled.
    """

    @property
    def block_m(self) -> int: ...
    @property
    def block_n(self) -> int: ...
    @property
    def mask_mode(self) -> str: ...
    @property
    def attn_impl(self) -> str: ...
    @property
    def use_sim_mask(self) -> bool: ...
    @property
    def causal(self) -> bool: ...
    @property
    def rest(self) -> str: ...
    @property
    def scale(self) -> float | None: ...
    @property
    def rearrange_method(self) -> str | None: ...
    @property
    def grid(self) -> tuple[int, int, int] | None: ...
    @property
    def tile_size(self) -> tuple[int, int, int] | None: ...
    @property
    def text_length(self) -> int: ...
    @property
    def text_position(self) -> str: ...

    def to_json(self) -> str: ...
