"""The demo's table, verdict, JSON and figure."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from shared_specs.tools.demo.compare import BINARY, METHODS, PYRAMID, Comparison
from shared_specs.tools.demo.masks import level_shares
from shared_specs.tools.demo.tokens import TEMPERATURES
from shared_specs.tools.figures import (
    LINE_COLOURS,
    plot_error_by_density,
    plot_levels,
    require_pyplot,
    style,
)

_LABELS = {PYRAMID: "pyramid (levels 0 1 2 4 8)", BINARY: "binary (levels 0 1)"}
_SHOWN_HEADS = 4


def table_rows(result: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the one table, as text."""
    titles = list(result.dense_seconds)
    header = ["attention", "density"]
    for title in titles:
        header += [f"{title} ms", "speed-up"]
    header += ["rel. error", "PSNR dB"]
    dense = ["dense", "100.0 %"]
    for title in titles:
        dense += [f"{1e3 * result.dense_seconds[title]:,.0f}", "1.0x"]
    rows = [[*dense, "-", "-"]]
    for method in METHODS:
        judged = result.methods[method]
        row = [_LABELS[method], f"{judged.density:.1%}".replace("%", " %")]
        for title in titles:
            seconds = judged.seconds[title]
            row += [f"{1e3 * seconds:,.0f}", f"{result.dense_seconds[title] / seconds:.1f}x"]
        rows.append([*row, f"{judged.error:.3f}", f"{judged.psnr:.1f}"])
    return header, rows


def notes(result: Comparison) -> list[str]:
    """Sentences under the table: agreement of the frameworks, and who wins, where and why."""
    lines = []
    if result.frameworks_differ is not None:
        worst = max(result.frameworks_differ.values())
        lines.append(
            f"Between the frameworks: outputs differ by at most {worst:.1e} of the largest value; "
            f"{result.levels_agree:.2%} of the blocks have the same level."
        )
    pyramid, binary = result.methods[PYRAMID], result.methods[BINARY]
    ratio = pyramid.error / binary.error
    if ratio < 1:
        lines.append(f"At equal cost the pyramid mask has {1 - ratio:.0%} less error than binary.")
    else:
        lines.append(f"At equal cost the pyramid mask does NOT win: {ratio - 1:.0%} more error.")
    lines += _where_binary_wins(result)
    return lines


def _where_binary_wins(result: Comparison) -> list[str]:
    lines = []
    lost = [
        f"{pyramid.density:.0%} ({pyramid.whole_blocks:.1f} of {result.levels.shape[-1]} blocks of "
        f"a row whole, binary {binary.whole_blocks:.1f})"
        for pyramid, binary in zip(result.curves[PYRAMID], result.curves[BINARY], strict=True)
        if pyramid.error >= binary.error
    ]
    if lost:
        lines.append(
            f"Binary has less error at density {', '.join(lost)}: the pyramid mask keeps so few "
            "blocks whole there that the keys a sharp head looks at are averaged."
        )
    by_head = zip(
        result.methods[PYRAMID].error_by_head, result.methods[BINARY].error_by_head, strict=True
    )
    heads = [index for index, (pyramid, binary) in enumerate(by_head) if pyramid >= binary]
    if heads:
        temperatures = sorted({TEMPERATURES[index % len(TEMPERATURES)] for index in heads})
        lines.append(
            f"By head, binary is at least level on {len(heads)} of "
            f"{len(result.methods[PYRAMID].error_by_head)} (heads "
            f"{', '.join(map(str, heads))}; temperature "
            f"{', '.join(f'{value:g}' for value in temperatures)}): the sharper a head, the less "
            "the blocks behind its best ones matter, and the less their means add."
        )
    return lines


def markdown(title: str, table: tuple[list[str], list[list[str]]], lines: list[str]) -> str:
    """The caption, the table and the sentences under it, for a README."""
    header, rows = table
    ruled = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    drawn = ["| " + " | ".join(row) + " |" for row in ruled]
    return "\n".join([title, "", *drawn, "", *lines]) + "\n"


def caption(result: Comparison, source: str, grid: tuple[int, int, int], device: str) -> str:
    """One line that says what was run."""
    _, heads, tokens, head_dim = result.shape
    sides = " x ".join(map(str, grid))
    dtype = "bfloat16" if device == "gpu" else "float32"
    return (
        f"{source}: {tokens:,} tokens ({sides}), {heads} heads of {head_dim}, {dtype}, on {device}"
    )


def write_json(result: Comparison, path: Path, **about: Any) -> None:
    """All figures of the comparison; the mask itself only as shares of its levels."""
    data = dataclasses.asdict(dataclasses.replace(result, levels=np.empty(0)))
    data["levels"] = {str(level): share for level, share in level_shares(result.levels).items()}
    path.write_text(json.dumps({**about, **data}, indent=2) + "\n", encoding="utf-8")


def draw(result: Comparison, frame: np.ndarray) -> Any:
    """The demo's figure: a frame, masks of a few heads, and the errors of both methods."""
    plt = require_pyplot()
    masks = result.levels[0]
    shown = min(_SHOWN_HEADS, len(masks))
    with style():
        figure = plt.figure(figsize=(7.2, 4.6), layout="constrained")
        top, bottom = figure.subfigures(2, 1, height_ratios=[1.15, 1.0])
        mask_axes = top.subplots(1, shown, squeeze=False)[0]
        titles = [
            f"head {index}, temperature {TEMPERATURES[index % len(TEMPERATURES)]:g}"
            for index in range(shown)
        ]
        plot_levels(masks[:shown], mask_axes, titles=titles)
        frame_ax, curve_ax, head_ax = bottom.subplots(1, 3, width_ratios=[1.25, 1.0, 1.0])
        _draw_frame(frame, frame_ax)
        points = {
            method: [(judged.density, judged.error) for judged in curve]
            for method, curve in result.curves.items()
        }
        plot_error_by_density(points, curve_ax)
        _draw_heads(result, head_ax)
    return figure


def _draw_frame(frame: np.ndarray, ax: Any) -> None:
    ax.imshow(frame)
    ax.set_title("a frame of the clip")
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)


def _draw_heads(result: Comparison, ax: Any) -> None:
    heads = np.arange(len(result.methods[PYRAMID].error_by_head))
    for index, method in enumerate(METHODS):
        ax.bar(
            heads + 0.4 * (index - 0.5),
            result.methods[method].error_by_head,
            width=0.38,
            color=LINE_COLOURS[index],
            label=method,
        )
    ax.set_xticks(heads)
    ax.set_xlabel(f"head, at density {result.methods[PYRAMID].density:.0%}")
    ax.set_ylabel("relative error")
