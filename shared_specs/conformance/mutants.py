"""Deliberately wrong implementations: the specification with one rule broken.

Each is named by the flag of the mistake it makes; `MUTANTS["no_log_bias"]` is an adapter. They
replace single functions of the NumPy specification while they run, so that every other rule
stays the one statement there is. They are what the flags of the cases are measured with.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np

from shared_specs import attention, selection
from shared_specs.config import PSAConfig
from shared_specs.conformance.flags import FLAGS
from shared_specs.conformance.reference import NumpyAdapter
from shared_specs.constants import LEVELS
from shared_specs.geometry import cdiv, level_start, padded_length
from shared_specs.pyramid import pooled_counts

Call = dict[str, Any]


class Mutant(NumpyAdapter):
    """The NumPy adapter with one mistake.

    Args:
        flag: the mistake, a key of `FLAGS`.
        patches: functions of the specification to replace, as (module, name, replacement).
        before: changes the arguments of a call; gets and returns (tier, arguments).
        after: changes the answer; gets (tier, arguments, answer).
    """

    def __init__(
        self,
        flag: str,
        *,
        patches: Callable[[str, Call], list[tuple[Any, str, Any]]] | None = None,
        before: Callable[[str, Call], Call] | None = None,
        after: Callable[[str, Call, Any], Any] | None = None,
    ):
        assert flag in FLAGS
        self.name, self.flag = flag, flag
        self._patches, self._before, self._after = patches, before, after

    def _run(self, tier: str, arguments: Call) -> Any:
        if self._before:
            arguments = self._before(tier, arguments)
        with contextlib.ExitStack() as stack:
            for target, name, replacement in (
                self._patches(tier, arguments) if self._patches else ()
            ):
                stack.enter_context(mock.patch.object(target, name, replacement, create=True))
            answer = getattr(NumpyAdapter, tier)(self, **arguments)
        return self._after(tier, arguments, answer) if self._after else answer

    def select(self, scores, config, **rest):
        return self._run("select", {"scores": scores, "config": config, **rest})

    def table(self, levels, **rest):
        return self._run("table", {"levels": levels, **rest})

    def forward(self, q, k, v, levels, **rest):
        return self._run("forward", {"q": q, "k": k, "v": v, "levels": levels, **rest})

    def backward(self, q, k, v, levels, dout, dlse, **rest):
        return self._run(
            "backward",
            {"q": q, "k": k, "v": v, "levels": levels, "dout": dout, "dlse": dlse, **rest},
        )

    def order(self, method, grid, tile):
        return self._run("order", {"method": method, "grid": grid, "tile": tile})


def _always(*patches):
    return lambda tier, arguments: list(patches)


def _full_counts(kv_len: int, block_n: int) -> np.ndarray:
    return np.repeat(LEVELS, padded_length(kv_len, block_n) // np.array(LEVELS)).astype(np.int32)


def _tail_counted_full(kv_len: int, block_n: int) -> np.ndarray:
    return np.where(pooled_counts(kv_len, block_n) > 0, _full_counts(kv_len, block_n), 0)


def _shifted_last_key(shift: int):
    true = attention._last_covered_key
    return lambda kv_len, block_n: true(kv_len, block_n) + shift


def _first_covered_key(kv_len: int, block_n: int) -> np.ndarray:
    padded = padded_length(kv_len, block_n)
    return np.concatenate([np.arange(padded // level) * level for level in LEVELS])


def _without_offset(tier: str, arguments: Call) -> list:
    if tier not in ("forward", "backward"):
        return []
    offset = arguments["k"].shape[2] - arguments["q"].shape[2]
    return [(attention, "_last_covered_key", _shifted_last_key(offset))]


def _segments_swapped(segments: np.ndarray) -> np.ndarray:
    levels = TRUE_FROM_SEGMENTS(segments)
    return np.where(levels == 2, 4, np.where(levels == 4, 2, levels)).astype(np.int32)


def _separator_as_block(segments: np.ndarray) -> np.ndarray:
    """The first separator, read as an index, lands on the last block."""
    levels = TRUE_FROM_SEGMENTS(segments)
    levels[..., -1] = 1
    return levels


TRUE_FROM_SEGMENTS = attention.from_segments


def _heads_reversed(tier: str, arguments: Call, answer: Any) -> Any:
    if tier == "forward":
        return tuple(x[:, ::-1] for x in answer)
    return (answer[0][:, ::-1], *answer[1:]) if tier == "backward" else answer


def _scale_twice(tier: str, arguments: Call) -> Call:
    if tier not in ("forward", "backward"):
        return arguments
    scale = arguments["scale"]
    scale = arguments["q"].shape[3] ** -0.5 if scale is None else scale
    return {**arguments, "scale": scale * scale}


def _value_scale(tier: str, arguments: Call) -> Call:
    if tier not in ("forward", "backward") or arguments["scale"] is not None:
        return arguments
    return {**arguments, "scale": arguments["v"].shape[3] ** -0.5}


def _without_lengths(tier: str, arguments: Call) -> Call:
    return {name: x for name, x in arguments.items() if name not in ("q_lens", "kv_lens")}


def _longer_lengths(tier: str, arguments: Call) -> Call:
    changed = dict(arguments)
    for name, of in (("q_lens", "q"), ("kv_lens", "k")):
        if arguments.get(name) is not None:
            changed[name] = np.minimum(arguments[name] + 1, arguments[of].shape[2])
    return changed


def _lse_base_2(tier: str, arguments: Call, answer: Any) -> Any:
    return (answer[0], answer[1] / np.log(2)) if tier == "forward" else answer


def _mean_on_empty_rows(tier: str, arguments: Call, answer: Any) -> Any:
    if tier != "forward":
        return answer
    out, lse = answer
    v = arguments["v"].mean(2, keepdims=True)
    v = np.repeat(v, out.shape[1] // v.shape[1], axis=1)
    empty = np.isneginf(lse)
    return np.where(empty[..., None], v, out), np.where(empty, np.log(arguments["k"].shape[2]), lse)


def _sum_unpool(rows: np.ndarray, kv_len: int, block_n: int) -> np.ndarray:
    grad = np.zeros((*rows.shape[:2], kv_len, rows.shape[3]), rows.dtype)
    for level in LEVELS:
        grad += rows[:, :, level_start(kv_len, block_n, level) + np.arange(kv_len) // level]
    return grad


def _repeated_tail_unpool(rows: np.ndarray, kv_len: int, block_n: int) -> np.ndarray:
    """As if the last key had been copied to fill its groups."""
    grad = np.zeros((*rows.shape[:2], kv_len, rows.shape[3]), rows.dtype)
    for level in LEVELS:
        start = level_start(kv_len, block_n, level)
        whole = cdiv(kv_len, level) * level
        owner = np.minimum(np.arange(whole), kv_len - 1)
        for copy, key in enumerate(owner):
            grad[:, :, key] += rows[:, :, start + copy // level] / level
    return grad


def _first_head_of_group(tier: str, arguments: Call, answer: Any) -> Any:
    if tier != "backward":
        return answer
    heads = np.arange(arguments["q"].shape[1])
    first = heads % (len(heads) // arguments["k"].shape[1]) == 0
    dout = arguments["dout"] * first[:, None, None]
    dlse = arguments["dlse"]
    dlse = None if dlse is None else dlse * first[:, None]
    _, dk, dv = NumpyAdapter().backward(**{**arguments, "dout": dout, "dlse": dlse})
    return answer[0], dk, dv


def _merge_two(self: PSAConfig, level: int) -> int:
    return min(TRUE_MERGE(self, level), 2)


TRUE_MERGE = PSAConfig.merge


def _whole_tiles_down(count: int, last: int, n: int, merge: int) -> int:
    return min(last + count // merge * merge, n)


def _whole_tiles_past_the_end(count: int, last: int, n: int, merge: int) -> int:
    return min(last + cdiv(count, merge) * merge, n)


def _ties_to_higher(scores: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    n = scores.shape[-1]
    seen = np.arange(n) < candidates[:, None]
    key = np.where(seen, np.where(np.isnan(scores), -1, scores), -2)
    return n - 1 - np.argsort(-key[..., ::-1], axis=-1, kind="stable")


def _no_straddling(q_len: int, kv_len: int, config: PSAConfig) -> tuple[np.ndarray, np.ndarray]:
    _, last = TRUE_ROW_POSITIONS(q_len, kv_len, config)
    return last + 1, last


TRUE_ROW_POSITIONS = selection._row_positions


def _config_with(**fields):
    def change(tier: str, arguments: Call) -> Call:
        if tier != "select":
            return arguments
        return {**arguments, "config": dataclasses.replace(arguments["config"], **fields)}

    return change


def _drop(name: str, tier_of: str):
    return lambda tier, arguments: {**arguments, name: None} if tier == tier_of else arguments


def _on_table(change):
    def after(tier: str, arguments: Call, answer: Any) -> Any:
        return change(arguments, *answer) if tier == "table" else answer

    return after


def _reverse_groups(arguments: Call, entries: np.ndarray, counts: np.ndarray):
    entries = entries.copy()
    for row in np.ndindex(counts.shape[:3]):
        ends = np.cumsum(counts[row])
        for begin, end in zip(ends - counts[row], ends, strict=True):
            entries[row][begin:end] = entries[row][begin:end][::-1]
    return entries, counts


def _swap_two_and_four(tier: str, arguments: Call) -> Call:
    if tier != "table":
        return arguments
    levels = arguments["levels"]
    swapped = np.where(levels == 2, 4, np.where(levels == 4, 2, levels))
    return {**arguments, "levels": swapped}


def _untransposed(tier: str, arguments: Call) -> Call:
    return {**arguments, "transposed": False} if tier == "table" else arguments


def _order_inverse(tier: str, arguments: Call, answer: Any) -> Any:
    return np.argsort(answer) if tier == "order" else answer


def _order_axes(tier: str, arguments: Call) -> Call:
    if tier != "order":
        return arguments
    tile = arguments["tile"]
    return {**arguments, "grid": arguments["grid"][::-1], "tile": tile and tile[::-1]}


MUTANTS = {
    mutant.flag: mutant
    for mutant in (
        Mutant(
            "no_log_bias",
            patches=_always((attention, "_bias", lambda counts: np.zeros(counts.shape))),
        ),
        Mutant(
            "wrong_level_bias",
            patches=_always(
                (attention, "_bias", lambda counts: np.log(np.where(counts > 1, 2, 1) * counts))
            ),
        ),
        Mutant(
            "tail_counted_full", patches=_always((attention, "pooled_counts", _tail_counted_full))
        ),
        Mutant("tail_past_end", patches=_always((attention, "pooled_counts", _full_counts))),
        Mutant(
            "causal_late",
            patches=_always((attention, "_last_covered_key", _shifted_last_key(-1))),
        ),
        Mutant(
            "causal_early",
            patches=_always((attention, "_last_covered_key", _shifted_last_key(1))),
        ),
        Mutant(
            "causal_first_key",
            patches=_always((attention, "_last_covered_key", _first_covered_key)),
        ),
        Mutant("causal_no_offset", patches=_without_offset),
        Mutant(
            "segments_swapped", patches=_always((attention, "from_segments", _segments_swapped))
        ),
        Mutant(
            "separator_as_block",
            patches=_always((attention, "from_segments", _separator_as_block)),
        ),
        Mutant("heads_transposed", after=_heads_reversed),
        Mutant(
            "heads_interleaved",
            patches=_always((attention, "_kv_head", lambda h, heads, kv_heads: h % kv_heads)),
        ),
        Mutant("scale_twice", before=_scale_twice),
        Mutant("lse_base_2", after=_lse_base_2),
        Mutant("value_scale", before=_value_scale),
        Mutant("lengths_ignored", before=_without_lengths),
        Mutant("length_read_past", before=_longer_lengths),
        Mutant("empty_rows", after=_mean_on_empty_rows),
        Mutant("grad_sum_pooling", patches=_always((attention, "_unpool", _sum_unpool))),
        Mutant(
            "grad_repeated_tail", patches=_always((attention, "_unpool", _repeated_tail_unpool))
        ),
        Mutant("grad_no_dlse", before=_drop("dlse", "backward")),
        Mutant("grad_first_kv_head", after=_first_head_of_group),
        Mutant("merge_two", patches=_always((PSAConfig, "merge", _merge_two))),
        Mutant("merge_down", patches=_always((selection, "_whole_tiles", _whole_tiles_down))),
        Mutant(
            "merge_up_at_end",
            patches=_always((selection, "_whole_tiles", _whole_tiles_past_the_end)),
        ),
        Mutant("ties_to_higher", patches=_always((selection, "rank_blocks", _ties_to_higher))),
        Mutant("no_min_full", before=_config_with(min_full_ratio=0.0)),
        Mutant(
            "crossing_excluded",
            patches=_always((selection, "_past_bound", lambda inside, last: max(inside, last))),
        ),
        # `int` is looked up as a global of the module first, so this replaces its truncations
        Mutant("ends_rounded", patches=_always((selection, "int", round))),
        Mutant("no_cap", before=_drop("cap", "select")),
        Mutant("no_text", before=_config_with(text_length=0)),
        Mutant("no_sinks", before=_config_with(sink_blocks=0)),
        Mutant("diagonal_pooled", patches=_always((selection, "_row_positions", _no_straddling))),
        Mutant("future_kept", before=_config_with(causal=False)),
        Mutant(
            "empty_row_kept",
            patches=_always((selection, "_fill_empty_rows", lambda levels, ranked: levels)),
        ),
        Mutant("table_unsorted", after=_on_table(_reverse_groups)),
        Mutant("table_levels_swapped", before=_swap_two_and_four),
        Mutant("table_not_transposed", before=_untransposed),
        Mutant(
            "table_zero_fill",
            after=_on_table(
                lambda arguments, entries, counts: (np.where(entries < 0, 0, entries), counts)
            ),
        ),
        Mutant("order_inverse", after=_order_inverse),
        Mutant("order_axes", before=_order_axes),
    )
}
"""Flag -> adapter that makes that mistake and no other."""
