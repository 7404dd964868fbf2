"""The cases of each suite version, as drafts that the generator fills with numbers."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from shared_specs.config import PSAConfig
from shared_specs.geometry import cdiv
from shared_specs.masks import to_segments

ALL_DTYPES = ("float64", "float32", "float16", "bfloat16")
ALL_LEVELS = [0, 1, 2, 4, 8]


@dataclasses.dataclass(frozen=True)
class Draft:
    """A case before its numbers. Which fields matter depends on the tier.

    Attributes:
        parameters: keyword arguments of the adapter's method, as plain data.
        shape: (B, H, Hk, Lq, Lk, D) of attention, or the shape of a level mask.
        levels: values a mask is drawn from.
        level_of: replaces drawn levels: gets the drawn mask, returns the mask.
        q_range, k_range: largest magnitude of q and k.
        scores: 'unit', 'skewed', 'tied', 'zeros', 'one_hot' or 'nan'.
        cap_heads: key heads of a similarity cap; 0 for none.
        value_dim: head dimension of values; None means that of keys.
        lens: (q_lens, kv_lens) of the sequences of the batch, or none.
    """

    id: str
    tier: str
    rule: str
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)
    shape: tuple[int, ...] = ()
    levels: list[int] = dataclasses.field(default_factory=lambda: ALL_LEVELS)
    level_of: Callable[[np.ndarray], np.ndarray] | None = None
    segments: bool = False
    q_range: float = 1.0
    k_range: float = 2.0
    with_dlse: bool = True
    dtypes: tuple[str, ...] = ALL_DTYPES
    scores: str = "skewed"
    heads: tuple[int, int] = (1, 1)
    cap_heads: int = 0
    value_dim: int | None = None
    lens: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @property
    def requires(self) -> dict[str, list[Any]]:
        """What an adapter needs, by the keys of `Adapter.capabilities`."""
        if self.tier not in ("forward", "backward"):
            return {}
        _, h, kv_heads, q_len, kv_len, dim = self.shape
        block_m, block_n = self.parameters["block_m"], self.parameters["block_n"]
        needs = {
            "mask_form": ["segments" if self.segments else "dense"],
            "head_dim": [dim],
            "block_m": [block_m],
            "block_n": [block_n],
            "levels": sorted(self.levels),
        }
        if self.value_dim:
            needs["value_dim"] = [self.value_dim]
        features = {
            "is_causal": self.parameters["is_causal"],
            "grouped": h != kv_heads,
            "unequal_lengths": q_len != kv_len,
            "ragged": bool(q_len % block_m or kv_len % block_n),
            "empty_rows": self.level_of is empty_first or q_len > kv_len,
            "dlse": self.tier == "backward" and self.with_dlse,
            "lengths": self.lens is not None,
        }
        return needs | {name: [True] for name, needed in features.items() if needed}

    def make_levels(self, stream) -> np.ndarray:
        """The mask in the form the case hands over."""
        b, h, _, q_len, kv_len, _ = self.shape
        n_q = cdiv(q_len, self.parameters["block_m"])
        n_k = cdiv(kv_len, self.parameters["block_n"])
        levels = stream.choice(self.levels, (b, h, n_q, n_k)).astype(np.int32)
        # Every row keeps a key, unless the case is about rows that do not.
        finest = min(level for level in self.levels if level)
        levels[..., 0] = np.where((levels == 0).all(-1), finest, levels[..., 0])
        if self.level_of:
            levels = self.level_of(levels)
        return to_segments(levels) if self.segments else levels

    def make_scores(self, stream) -> np.ndarray:
        """float32 `[B, H, Nq, Nk]`."""
        config = PSAConfig.from_dict(self.parameters["config"])
        n_q = cdiv(self.parameters["q_len"], config.block_m)
        n_k = cdiv(self.parameters["kv_len"], config.block_n)
        scores = stream.unit((*self.heads, n_q, n_k))
        if self.scores == "skewed":
            scores = (scores.astype(np.float64) ** 4).astype(np.float32)
        elif self.scores == "tied":
            scores = np.floor(scores * 4) / np.float32(4)
        elif self.scores == "zeros":
            scores = np.zeros_like(scores)
        elif self.scores == "one_hot":
            scores = (scores == scores.max(-1, keepdims=True)).astype(np.float32)
        elif self.scores == "nan":
            scores[..., ::3] = np.nan
        return scores


def empty_first(levels: np.ndarray) -> np.ndarray:
    """The first query block of the first head sees nothing."""
    levels[0, 0, 0] = 0
    return levels


def ragged_last(level: int) -> Callable[[np.ndarray], np.ndarray]:
    """The ragged last key block has one level in every row."""

    def fix(levels: np.ndarray) -> np.ndarray:
        levels[..., -1] = level
        return levels

    return fix


def _forward(name, rule, shape, *, block_m=64, block_n=32, causal=False, scale=None, **fields):
    parameters = {"block_m": block_m, "block_n": block_n, "scale": scale, "is_causal": causal}
    tier = fields.pop("tier", "forward")
    return Draft(f"{tier}-{name}", tier, rule, parameters, shape, **fields)


def _backward(name, rule, shape, **fields):
    return _forward(name, rule, shape, tier="backward", **fields)


def _attention_cases() -> list[Draft]:
    cases = []
    blocks = list(itertools.product((64, 128), (32, 64, 128)))
    for m, n in blocks:
        cases.append(
            _forward(f"blocks-{m}x{n}", "4", (1, 1, 1, m, 3 * n, 32), block_m=m, block_n=n)
        )
        cases.append(
            _forward(
                f"causal-{m}x{n}", "4", (1, 1, 1, 140, 140, 32), block_m=m, block_n=n, causal=True
            )
        )
    for level in (1, 2, 4, 8):
        cases.append(_forward(f"level-{level}", "2", (1, 1, 1, 64, 96, 32), levels=[level]))
        for tail in (1, 3, 7) if level > 1 else (1,):
            cases.append(
                _forward(
                    f"tail-{tail}-level-{level}",
                    "2",
                    (1, 1, 1, 40, 64 + tail, 32),
                    level_of=ragged_last(level),
                )
            )
        cases.append(
            _forward(
                f"causal-level-{level}", "4", (1, 1, 1, 70, 70, 32), levels=[level], causal=True
            )
        )
    cases += [
        _forward("segments", "3", (1, 2, 2, 100, 160, 32), segments=True),
        _forward(
            "segments-64", "3", (1, 1, 1, 128, 320, 32), block_m=128, block_n=64, segments=True
        ),
        _forward("segments-ragged", "3", (1, 1, 1, 70, 150, 32), segments=True),
        _forward("segments-causal", "3", (1, 1, 1, 150, 150, 32), segments=True, causal=True),
        _forward("segments-binary", "3", (1, 1, 1, 64, 256, 32), levels=[0, 1], segments=True),
        _forward("binary", "4", (1, 2, 2, 128, 256, 32), block_n=64, levels=[0, 1]),
        _forward(
            "binary-128", "4", (1, 1, 1, 128, 256, 64), block_m=128, block_n=128, levels=[0, 1]
        ),
        _forward("binary-causal", "4", (1, 1, 1, 128, 128, 32), levels=[0, 1], causal=True),
        _forward("dense", "4", (1, 1, 1, 64, 96, 32), levels=[1]),
        _forward("one-key", "2", (1, 1, 1, 5, 1, 32), levels=[1]),
        _forward("one-key-level-8", "2", (1, 1, 1, 5, 1, 32), levels=[8]),
        _forward("one-query", "4", (1, 1, 1, 1, 100, 32)),
        _forward("one-block", "4", (1, 1, 1, 64, 32, 32), levels=[2]),
        _forward("short-keys", "1", (1, 1, 1, 150, 40, 32)),
        _forward("short-queries", "1", (1, 1, 1, 20, 170, 32)),
        _forward("causal-offset", "4", (1, 1, 1, 40, 130, 32), causal=True),
        _forward("causal-offset-odd", "4", (1, 1, 1, 33, 101, 32), causal=True),
        _forward("causal-more-queries", "4", (1, 1, 1, 130, 60, 32), causal=True),
        _forward("causal-last-query", "4", (1, 1, 1, 1, 77, 32), causal=True),
        _forward("causal-block-64-tail", "4", (1, 1, 1, 130, 133, 32), block_n=64, causal=True),
        _forward("batch", "1", (2, 2, 2, 40, 70, 32)),
        _forward("grouped-4-2", "1", (1, 4, 2, 30, 70, 32)),
        _forward("grouped-4-1", "1", (1, 4, 1, 30, 70, 32)),
        _forward("grouped-6-2-causal", "1", (1, 6, 2, 30, 40, 32), causal=True),
        _forward("grouped-batch", "1", (2, 4, 2, 20, 50, 32)),
        _forward("empty-rows", "4", (1, 2, 2, 70, 64, 32), level_of=empty_first),
        _forward(
            "empty-rows-causal", "4", (1, 1, 1, 70, 70, 32), level_of=empty_first, causal=True
        ),
        _forward("dim-64", "1", (1, 1, 1, 40, 70, 64)),
        _forward("dim-128", "1", (1, 1, 1, 30, 50, 128)),
        _forward("dim-256", "1", (1, 1, 1, 20, 40, 256)),
        _forward("dim-128-causal", "1", (1, 1, 1, 40, 40, 128), causal=True),
        _forward("scale", "4", (1, 1, 1, 64, 96, 32), scale=0.5),
        _forward("scale-zero", "4", (1, 1, 1, 64, 96, 32), scale=0.0),
        _forward("scale-negative", "4", (1, 1, 1, 64, 96, 32), scale=-0.25),
        _forward(
            "large-logits",
            "4",
            (1, 1, 1, 64, 96, 32),
            q_range=4,
            k_range=4,
            scale=4.0,
            dtypes=("float64", "float32"),
        ),
        _forward(
            "large-logits-causal",
            "4",
            (1, 1, 1, 64, 64, 32),
            q_range=4,
            k_range=4,
            scale=8.0,
            causal=True,
            dtypes=("float64", "float32"),
        ),
        _forward("equal-keys", "4", (1, 1, 1, 64, 90, 32), k_range=0),
    ]
    cases += [
        _backward("mixed", "4", (1, 1, 1, 64, 96, 32)),
        _backward("no-lse", "4", (1, 1, 1, 40, 64, 32), with_dlse=False),
        _backward("level-1", "4", (1, 1, 1, 40, 64, 32), levels=[1]),
        _backward("level-2", "2", (1, 1, 1, 40, 64, 32), levels=[2]),
        _backward("level-4", "2", (1, 1, 1, 40, 64, 32), levels=[4]),
        _backward("level-8", "2", (1, 1, 1, 40, 64, 32), levels=[8]),
        _backward("binary", "4", (1, 1, 1, 64, 128, 32), block_n=64, levels=[0, 1]),
        _backward("tail-level-2", "2", (1, 1, 1, 40, 65, 32), level_of=ragged_last(2)),
        _backward("tail-level-4", "2", (1, 1, 1, 40, 71, 32), level_of=ragged_last(4)),
        _backward("tail-level-8", "2", (1, 1, 1, 40, 69, 32), level_of=ragged_last(8)),
        _backward("causal", "4", (1, 1, 1, 70, 70, 32), causal=True),
        _backward("causal-offset", "4", (1, 1, 1, 30, 70, 32), causal=True),
        _backward("causal-more-queries", "4", (1, 1, 1, 80, 40, 32), causal=True),
        _backward("causal-level-8", "4", (1, 1, 1, 70, 70, 32), levels=[8], causal=True),
        _backward("grouped", "1", (1, 4, 2, 24, 40, 32)),
        _backward("grouped-causal", "1", (1, 2, 1, 40, 40, 32), causal=True),
        _backward("batch", "1", (2, 1, 1, 24, 40, 32)),
        _backward("empty-rows", "4", (1, 1, 1, 70, 40, 32), level_of=empty_first),
        _backward("blocks-128x64", "4", (1, 1, 1, 90, 100, 32), block_m=128, block_n=64),
        _backward("blocks-128x128", "4", (1, 1, 1, 90, 130, 32), block_m=128, block_n=128),
        _backward("dim-64", "1", (1, 1, 1, 24, 40, 64)),
        _backward("dim-128", "1", (1, 1, 1, 16, 32, 128)),
        _backward("segments", "3", (1, 1, 1, 40, 96, 32), segments=True),
        _backward("one-key", "2", (1, 1, 1, 5, 1, 32), levels=[4]),
        _backward("scale-negative", "4", (1, 1, 1, 40, 64, 32), scale=-0.25),
    ]
    return cases


OLD = {"attn_impl": "old_mask_type", "block_n": 128}
BOUND = {"mask_mode": "thresholdbound"}
WIDE = {"mask_ratios": {"1": [0.0, 0.2], "2": [0.2, 0.35], "4": [0.35, 0.62], "8": [0.62, 0.97]}}
WAN = {"mask_ratios": {"1": [0.0, 0.4], "2": [0.4, 0.5], "4": [0.5, 0.6], "8": [0.6, 0.8]}}
GAP = {"mask_ratios": {"1": [0.0, 0.2], "0": [0.2, 0.5], "8": [0.5, 1.0]}}


def _select(name, rule, blocks, config=None, *, q_blocks=2, ragged=0, **fields):
    config = config or {}
    block_n = config.get("block_n", 64)
    block_m = config.get("block_m", 128)
    q_len = fields.pop("q_len", q_blocks * block_m - ragged)
    parameters = {"config": config, "q_len": q_len, "kv_len": blocks * block_n - ragged}
    return Draft(f"select-{name}", "select", rule, parameters, **fields)


def _select_cases() -> list[Draft]:
    cases = []
    for (mode, extra), (block_n, tile_n) in itertools.product(
        (("topk", {}), ("bound", BOUND)), ((32, 32), (64, 32), (64, 16), (128, 32), (128, 128))
    ):
        config = {"block_n": block_n, "tile_n": tile_n, **WIDE, **extra}
        cases.append(_select(f"{mode}-{block_n}-{tile_n}", "6", 45, config))
    cases += [
        _select("default", "6", 128),
        _select("default-heads", "6", 40, heads=(2, 3)),
        _select("old", "6", 40, OLD),
        _select("old-bound", "6", 40, {**OLD, **BOUND, **WAN}),
        _select("bound-wan", "6", 50, {**BOUND, **WAN}),
        _select("bound-unit", "6", 61, {**BOUND, **WAN}, scores="unit"),
        _select("ties", "6", 40, scores="tied"),
        _select("ties-bound", "6", 40, {**BOUND, **WAN}, scores="tied"),
        _select("zeros", "6", 40, scores="zeros"),
        _select("zeros-bound", "6", 40, BOUND, scores="zeros"),
        _select("one-hot-bound", "6", 100, {**BOUND, **WAN}, scores="one_hot"),
        _select("nan", "6", 20, scores="nan"),
        _select("nan-bound", "6", 20, {**BOUND, **WAN}, scores="nan"),
        _select("gap", "6", 30, GAP),
        _select("gap-bound", "6", 30, {**GAP, **BOUND}),
        _select("end-of-row", "6", 29, {**WIDE, "block_n": 32}),
        _select("one-block", "6", 1),
        _select("two-blocks", "6", 2),
        _select("three-blocks-bound", "6", 3, BOUND),
        _select("seven-blocks", "6", 7, WIDE),
        _select("truncation", "6", 97, {"mask_ratios": {"1": [0, 0.29], "2": [0.29, 0.57]}}),
        _select("min-full", "6", 100, {**BOUND, "min_full_ratio": 0.3, **WAN}),
        _select("causal", "6.4", 16, {"causal": True}, q_blocks=8),
        _select("causal-bound", "6.4", 16, {"causal": True, **BOUND, **WAN}, q_blocks=8),
        _select("causal-offset", "6.4", 20, {"causal": True, **WIDE}, q_len=300),
        _select("causal-more-queries", "6.4", 3, {"causal": True}, q_len=500),
        _select("causal-old", "6.4", 8, {"causal": True, **OLD, **WIDE}, q_blocks=8),
        _select("causal-ragged", "6.4", 16, {"causal": True, **WIDE}, q_blocks=8, ragged=37),
        _select(
            "causal-64",
            "6.4",
            24,
            {"causal": True, "block_m": 64, "block_n": 32, **WIDE},
            q_blocks=12,
        ),
        _select("text-end", "6.2", 30, {"text_length": 100, **WIDE}, q_blocks=4, ragged=20),
        _select(
            "text-start", "6.2", 30, {"text_length": 226, "text_position": "start"}, q_blocks=4
        ),
        _select("sinks", "6.3", 30, {"sink_blocks": 3, **WIDE}),
        _select(
            "causal-text-sinks",
            "6",
            20,
            {"causal": True, "text_length": 90, "sink_blocks": 1, **WIDE},
            q_blocks=10,
        ),
        _select("cap", "6.1", 30, {**OLD, **WIDE, "use_sim_mask": True}, heads=(1, 2), cap_heads=2),
        _select(
            "cap-grouped",
            "6.1",
            30,
            {**OLD, **WAN, **BOUND, "use_sim_mask": True},
            heads=(1, 4),
            cap_heads=2,
        ),
        _select("level-8-only", "6", 30, {"mask_ratios": {"8": [0, 1]}, "block_n": 32}),
    ]
    return cases


def _table_cases() -> list[Draft]:
    shapes = {
        "row": (1, 1, 1, 40),
        "square": (1, 2, 7, 9),
        "batch": (2, 2, 3, 17),
        "one": (1, 1, 1, 1),
    }
    cases = []
    for (name, shape), transposed in itertools.product(shapes.items(), (False, True)):
        suffix = "-transposed" if transposed else ""
        cases.append(
            Draft(f"table-{name}{suffix}", "table", "3", {"transposed": transposed}, shape)
        )
    cases += [
        Draft("table-full", "table", "3", {"transposed": False}, (1, 1, 2, 33), levels=[1]),
        Draft("table-empty", "table", "3", {"transposed": False}, (1, 1, 2, 5), levels=[0]),
        Draft("table-pooled", "table", "3", {"transposed": False}, (1, 1, 4, 64), levels=[0, 2, 4]),
    ]
    return cases


def _order_cases() -> list[Draft]:
    cases = []
    for grid in ((4, 4, 4), (5, 3, 7), (8, 6, 4), (1, 1, 1), (1, 9, 1), (3, 1, 8), (2, 7, 5)):
        name = "x".join(map(str, grid))
        parameters = {"method": "Gilbert", "grid": list(grid), "tile": None}
        cases.append(Draft(f"order-gilbert-{name}", "order", "8", parameters))
    for grid, tile in (((4, 6, 8), (2, 3, 4)), ((5, 7, 9), (2, 3, 4)), ((3, 4, 5), (6, 8, 8))):
        name = "x".join(map(str, grid))
        parameters = {"method": "STA", "grid": list(grid), "tile": list(tile)}
        cases.append(Draft(f"order-sta-{name}", "order", "8", parameters))
    return cases


def _cases_of_version_2() -> list[Draft]:
    """Values of another head dimension, dimensions that are no power of two, and lengths."""
    lens = (70, 33, 0, 1), (100, 41, 64, 0)
    causal_lens = (70, 33, 64, 5), (70, 100, 9, 64)
    batch = (4, 2, 1, 70, 100, 16)
    return [
        _forward("value-dim", "1", (1, 2, 1, 40, 70, 32), value_dim=16),
        _forward("value-dim-causal", "1", (1, 1, 1, 40, 70, 16), value_dim=40, causal=True),
        _backward("value-dim", "1", (1, 2, 1, 40, 70, 24), value_dim=40),
        _backward("value-dim-causal", "1", (1, 2, 2, 40, 50, 32), value_dim=8, causal=True),
        _forward("dim-72", "1", (1, 1, 1, 30, 50, 72)),
        _backward("dim-72-causal", "1", (1, 2, 1, 30, 50, 72), causal=True),
        _forward("lengths", "1", batch, lens=lens),
        _forward("lengths-causal", "1", batch, lens=causal_lens, causal=True),
        _forward("lengths-segments", "1", batch, lens=lens, segments=True),
        _forward("lengths-value-dim", "1", batch, lens=causal_lens, value_dim=24, block_n=64),
        _backward("lengths", "1", batch, lens=lens),
        _backward("lengths-causal", "1", batch, lens=causal_lens, causal=True),
    ]


CASES = {
    "v1": [*_select_cases(), *_table_cases(), *_attention_cases(), *_order_cases()],
    "v2": _cases_of_version_2(),
}
"""By version; one contains those before it."""
