"""The one configuration class, the same in every framework (specification, sections 1, 5 to 8)."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared_specs import preset_files
from shared_specs.budget import check_budget
from shared_specs.checks import (
    check_flag,
    check_integer,
    check_number,
    check_rest,
    check_scale,
    check_triple,
)
from shared_specs.constants import BLOCK_M, BLOCK_N, LEVELS
from shared_specs.mask_ratios import DEFAULT_MASK_RATIOS, check_ratios, taken_order
from shared_specs.sampling import SamplePlan

MASK_MODES = ("topk", "thresholdbound", "budget")
ATTN_IMPLS = ("new_mask_type", "old_mask_type")
REARRANGE_METHODS = (None, "Gilbert", "STA", "Clusters", "SemanticAware", "Hybrid")
IMPORTANCE_ESTIMATORS = ("pooled", "sampled", "antidiagonal", "defect")
BUDGET_SCOPES = ("head", "row")
IMPORTANCE_POOLS = (2, 4, 8)
TEXT_POSITIONS = ("start", "end")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PSAConfig:
    """How pyramid sparse attention chooses and computes its blocks.

    Attributes:
        block_m: queries per block, 64 or 128 (128 with `old_mask_type`).
        block_n: keys per block, 32, 64 or 128 (128 with `old_mask_type`).
        tile_n: tokens of one tile, the unit that merged pooled blocks fill; a divisor of
            `block_n`, at least 8.
        mask_ratios: level -> (start, end), the share of a row's ranked blocks (`topk`) or of
            its score (`thresholdbound`) that gets the level. Starts at 0, contiguous,
            non-decreasing, at most 1. What is left over is skipped. Not for `budget`.
        mask_mode: 'topk', 'thresholdbound', or 'budget', which goes with importance='defect'.
        budget: share of the dense cost that levels may cost in 'budget', in (0, 1].
        budget_levels: levels that 'budget' may choose, ascending; always with 1.
        budget_scope: what has a budget of its own: each 'head', or each 'row' of query blocks.
        rest: what level 0 means: 'skip', the block is not seen, or 'mean', it is seen through the
            mean of its keys and values, in the same softmax (section 4).
        attn_impl: serial form of a mask: 'new_mask_type' (segments) or 'old_mask_type' (dense).
        use_sim_mask: cap levels where neighbouring keys differ (section 7); old_mask_type only.
        sim_2x_threshold, sim_4x_threshold, sim_8x_threshold: cosine above which a key block may
            be pooled by 2, 4, 8.
        rearrange_method: token order (section 8): None, 'Gilbert', 'STA', 'Clusters',
            'SemanticAware' or 'Hybrid'.
        causal: each query sees keys up to its own position; the last query sees the last key.
        scale: factor on q.k; None means head_dim ** -0.5.
        min_full_ratio: least share of a row's blocks at level 1 in 'thresholdbound'.
        importance: score estimator: 'pooled', 'sampled' or 'antidiagonal', or 'defect', which
            goes with mask_mode='budget' (section 5).
        importance_pool: tokens per group of the pooled estimator, 2, 4 or 8.
        sample_m, sample_n: sampled queries and keys per block; None means a quarter of the block,
            for 'defect' a sixteenth of the queries. There `sample_m` divides `block_m`.
        sample_seed: seed of the sampling plan (keys use `sample_seed + 1`).
        antidiagonal_stride: tile side of the antidiagonal estimator, in tokens.
        sink_blocks: leading key blocks that always get level 1.
        text_length: text tokens in the sequence, kept at level 1.
        text_position: end of the sequence that holds the text, 'start' or 'end'.
        grid: video tokens as (depth, height, width); needed by a token order.
        tile_size: tile of the 'STA' order as (depth, height, width).

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field, or a combination of fields, is outside what is accepted.
    """

    block_m: int = 128
    block_n: int = 64
    tile_n: int = 32
    mask_ratios: Mapping[int, tuple[float, float]] = DEFAULT_MASK_RATIOS
    mask_mode: str = "topk"
    budget: float = 0.15
    budget_levels: tuple[int, ...] = LEVELS
    budget_scope: str = "head"
    rest: str = "skip"
    attn_impl: str = "new_mask_type"
    use_sim_mask: bool = False
    sim_2x_threshold: float = 0.0
    sim_4x_threshold: float = 0.0
    sim_8x_threshold: float = -1.0
    rearrange_method: str | None = None
    causal: bool = False
    scale: float | None = None
    min_full_ratio: float = 0.06
    importance: str = "pooled"
    importance_pool: int = 4
    sample_m: int | None = None
    sample_n: int | None = None
    sample_seed: int = 0
    antidiagonal_stride: int = 8
    sink_blocks: int = 0
    text_length: int = 0
    text_position: str = "end"
    grid: tuple[int, int, int] | None = None
    tile_size: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "tile_n", "importance_pool", "antidiagonal_stride"):
            self._set(name, check_integer(name, getattr(self, name), 1))
        for name in ("sample_seed", "sink_blocks", "text_length"):
            self._set(name, check_integer(name, getattr(self, name), 0))
        for name in ("sample_m", "sample_n"):
            if getattr(self, name) is not None:
                self._set(name, check_integer(name, getattr(self, name), 1))
        for name in ("sim_2x_threshold", "sim_4x_threshold", "sim_8x_threshold"):
            self._set(name, check_number(name, getattr(self, name)))
        for name in ("min_full_ratio", "budget"):
            self._set(name, check_number(name, getattr(self, name)))
        self._set("budget_levels", _levels("budget_levels", self.budget_levels))
        if self.scale is not None:
            self._set("scale", check_number("scale", self.scale))
            check_scale(self.scale)
        for name in ("use_sim_mask", "causal"):
            check_flag(name, getattr(self, name))
        for name in ("grid", "tile_size"):
            if getattr(self, name) is not None:
                meaning = "None or (depth, height, width)"
                self._set(name, check_triple(name, getattr(self, name), meaning))
        _choice("mask_mode", self.mask_mode, MASK_MODES)
        _choice("budget_scope", self.budget_scope, BUDGET_SCOPES)
        check_rest(self.rest)
        _choice("attn_impl", self.attn_impl, ATTN_IMPLS)
        _choice("rearrange_method", self.rearrange_method, REARRANGE_METHODS)
        _choice("importance", self.importance, IMPORTANCE_ESTIMATORS)
        _choice("importance_pool", self.importance_pool, IMPORTANCE_POOLS)
        _choice("text_position", self.text_position, TEXT_POSITIONS)
        _choice("block_m", self.block_m, BLOCK_M)
        _choice("block_n", self.block_n, BLOCK_N)
        self._set("mask_ratios", check_ratios(self.mask_ratios))
        self._check_together()
        # Kept so that compilers and operators, which take no objects, can take the text.
        self._set("_json", json.dumps(self.to_dict(), indent=2))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_together(self) -> None:
        old = self.attn_impl == "old_mask_type"
        # The similarity mask first: its message names both ways out.
        if self.use_sim_mask and not old:
            raise ValueError(
                "use_sim_mask=True needs attn_impl='old_mask_type', got attn_impl="
                f"{self.attn_impl!r}: either set use_sim_mask=False, or use "
                "attn_impl='old_mask_type' with block_m=128, block_n=128, tile_n=32"
            )
        if old and (self.block_m, self.block_n) != (128, 128):
            raise ValueError(
                "attn_impl='old_mask_type' needs block_m=128 and block_n=128, got "
                f"block_m={self.block_m}, block_n={self.block_n}; other blocks need "
                "attn_impl='new_mask_type'"
            )
        if self.tile_n < 8 or self.block_n % self.tile_n:
            raise ValueError(
                f"tile_n must be a divisor of block_n={self.block_n} and at least 8, "
                f"got {self.tile_n}"
            )
        if not 0.0 <= self.min_full_ratio <= 1.0:
            raise ValueError(f"min_full_ratio must be in [0, 1], got {self.min_full_ratio}")
        for name, block in (("sample_m", self.block_m), ("sample_n", self.block_n)):
            count = getattr(self, name)
            if count is not None and count > block:
                raise ValueError(f"{name} must be None or in 1..{block}, got {count}")
        check_budget(self, DEFAULT_MASK_RATIOS)
        stride = self.antidiagonal_stride
        if self.block_m % stride or self.block_n % stride:
            raise ValueError(
                f"antidiagonal_stride must divide block_m={self.block_m} and "
                f"block_n={self.block_n}, got {stride}"
            )
        if self.causal and self.rearrange_method is not None:
            raise ValueError(
                f"causal=True with rearrange_method={self.rearrange_method!r} is contradictory: "
                "a token order moves tokens, so 'up to its own position' loses its meaning; "
                "set causal=False or rearrange_method=None"
            )

    @property
    def is_rest_mean(self) -> bool:
        """Whether a block of level 0 is seen as one mean (section 4)."""
        return self.rest == "mean"

    @property
    def rest_share(self) -> float:
        """Cost of a block of level 0 as a share of that of a whole one (section 9)."""
        return 1 / self.block_n if self.is_rest_mean else 0.0

    @property
    def ratio_ends(self) -> tuple[tuple[int, float], ...]:
        """(level, end) in the order in which selection takes them (section 6)."""
        return taken_order(self.mask_ratios)

    @property
    def resolved_sample_m(self) -> int:
        """Sampled queries per block, with the default filled in."""
        share = 16 if self.importance == "defect" else 4
        return self.block_m // share if self.sample_m is None else self.sample_m

    @property
    def resolved_sample_n(self) -> int:
        """Sampled keys per block, with the default filled in."""
        return self.block_n // 4 if self.sample_n is None else self.sample_n

    @property
    def query_samples(self) -> SamplePlan:
        """Which queries of a block the 'sampled' estimator looks at (section 5)."""
        return SamplePlan(self.block_m, self.resolved_sample_m, self.sample_seed)

    @property
    def key_samples(self) -> SamplePlan:
        """Which keys of a block the 'sampled' estimator looks at: another seed (section 5)."""
        return SamplePlan(self.block_n, self.resolved_sample_n, self.sample_seed + 1)

    @property
    def similarity_thresholds(self) -> dict[int, float]:
        """Level -> cosine above which a key block may be pooled by it, ascending (section 7)."""
        return {2: self.sim_2x_threshold, 4: self.sim_4x_threshold, 8: self.sim_8x_threshold}

    def resolved_scale(self, head_dim: int) -> float:
        """Factor on q.k, with the default filled in."""
        return resolve_scale(self.scale, head_dim)

    def merge(self, level: int) -> int:
        """Blocks of `level` that fill one tile (section 6)."""
        return max(1, math.ceil(level / (self.block_n // self.tile_n)))

    def to_dict(self) -> dict[str, Any]:
        """Plain data: mask_ratios with string keys and lists, as JSON and TOML hold them."""
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        data["mask_ratios"] = {str(k): list(v) for k, v in self.mask_ratios.items()}
        data["budget_levels"] = list(self.budget_levels)
        for name in ("grid", "tile_size"):
            data[name] = None if data[name] is None else list(data[name])
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PSAConfig:
        """The inverse of `to_dict`; missing fields keep their defaults.

        Raises:
            TypeError: `data` is not a mapping.
            ValueError: a key is not a field, or a value is not accepted.
        """
        if not isinstance(data, Mapping):
            raise TypeError(f"configuration must be a mapping, got {type(data).__name__}")
        fields = [field.name for field in dataclasses.fields(cls)]
        unknown = [key for key in data if key not in fields]
        if unknown:
            raise ValueError(f"unknown configuration keys {unknown}; accepted: {', '.join(fields)}")
        return cls(**data)

    def to_json(self) -> str:
        """One JSON object with every field."""
        return self._json  # pyright: ignore[reportAttributeAccessIssue]  # set, but no field

    @classmethod
    def from_json(cls, text: str | bytes) -> PSAConfig:
        """Parse `to_json` output; unknown and repeated keys are refused."""
        try:
            data = json.loads(text, object_pairs_hook=_unique_keys)
        except (UnicodeDecodeError, RecursionError, json.JSONDecodeError) as error:
            raise ValueError(f"configuration is not valid JSON: {error}") from error
        return cls.from_dict(data)

    def to_toml(self) -> str:
        """A TOML document; fields that are None are left out, as TOML has no null."""
        data = self.to_dict()
        ratios = data.pop("mask_ratios")
        lines = [f"{key} = {json.dumps(value)}" for key, value in data.items() if value is not None]
        lines += ["", "[mask_ratios]"]
        lines += [f"{level} = {json.dumps(bounds)}" for level, bounds in ratios.items()]
        return "\n".join(lines) + "\n"

    @classmethod
    def from_toml(cls, text: str) -> PSAConfig:
        """Parse `to_toml` output; unknown keys are refused."""
        try:
            data = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise ValueError(f"configuration is not valid TOML: {error}") from error
        return cls.from_dict(data)

    def save(self, path: str | Path) -> None:
        """Write to a .json or .toml file."""
        path = Path(path)
        text = self.to_json() if _file_kind(path) == ".json" else self.to_toml()
        path.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> PSAConfig:
        """Read a .json or .toml file."""
        path = Path(path)
        read = cls.from_json if _file_kind(path) == ".json" else cls.from_toml
        try:
            return read(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"configuration {path} is not UTF-8 text: {error}") from error

    @classmethod
    def preset(cls, name: str, video_size: tuple[int, int, int] | None = None) -> PSAConfig:
        """A configuration by name: a published one, or 'accurate', the one closest to dense.

        Args:
            name: one of `shared_specs.presets.names()`.
            video_size: (width, height, frames) in pixels and frames; fills `grid`.

        Raises:
            ValueError: no preset has this name, or it cannot give such a video a grid.
        """
        data = preset_files.read(name)
        grid = preset_files.grid_of(name, data["divisors"], video_size)
        return cls.from_dict({**data["config"], "grid": grid})


def check_config(config: Any) -> PSAConfig:
    """`config`, or the default one for None.

    Raises:
        TypeError: it is something else.
    """
    if config is None:
        return _DEFAULT
    if not isinstance(config, PSAConfig):
        raise TypeError(f"config must be a PSAConfig or None, got {type(config).__name__}")
    return config


def resolve_scale(scale: float | None, head_dim: int) -> float:
    """Factor on q.k: `scale`, or `head_dim ** -0.5` where it is None (section 4)."""
    return head_dim**-0.5 if scale is None else float(scale)


def _levels(name: str, value: Any) -> tuple[int, ...]:
    if isinstance(value, (str, bytes)) or not hasattr(value, "__len__"):
        raise TypeError(f"{name} must be levels such as {LEVELS}, got {value!r}")
    levels = tuple(check_integer(f"{name}[{i}]", level, 1) for i, level in enumerate(value))
    if levels != tuple(level for level in LEVELS if level in levels) or 1 not in levels:
        raise ValueError(f"{name} must be a part of {LEVELS} with 1 in it, ascending, got {levels}")
    return levels


def _choice(name: str, value: Any, accepted: tuple) -> None:
    if not any(value is choice or value == choice for choice in accepted):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}, got {value!r}")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError(f"configuration repeats a key: {[key for key, _ in pairs]}")
    return data


def _file_kind(path: Path) -> str:
    if path.suffix not in (".json", ".toml"):
        raise ValueError(f"path must end in .json or .toml, got {str(path)!r}")
    return path.suffix


_DEFAULT = PSAConfig()
