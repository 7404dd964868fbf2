"""Tables and the figure, made from stored rows alone."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.session import BINARY, DENSE, GIVEN, PART, WHOLE
from benchmarks.workloads import BACKWARD, BOTH, FORWARD
from shared_specs.tools.figures import (
    LINE_COLOURS,
    LINE_MARKERS,
    require_pyplot,
    save_figure,
    style,
)

BEGIN, END = "<!-- benchmark rows: begin -->", "<!-- benchmark rows: end -->"
DEMO_BEGIN, DEMO_END = "<!-- demo table: begin -->", "<!-- demo table: end -->"
DEMO_FIGURE = Path("docs", "images", "demo.png")
SUMMARY_BEGIN, SUMMARY_END = "<!-- speed summary: begin -->", "<!-- speed summary: end -->"
# The workloads that the summary shows, one of each kind of device.
SUMMARY_WORKLOADS = ("cpu-8k-h8-d64-default", "gpu-32k-h24-d128-default")
# Beside the page that shows it.
FIGURE = Path("images", "benchmark.png")
# The workloads of the figure's curve differ in length alone.
_CURVE = "-h24-d128-default"

Row = dict[str, Any]


def load(paths: Iterable[Path]) -> list[Row]:
    """All rows; a later row for the same workload, provider and pass replaces an earlier one.

    Raises:
        ValueError: a line is not a row.
    """
    rows: dict[tuple, Row] = {}
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
                key = (row["workload"], row["provider"], row.get("pass"), row["machine"]["device"])
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number} is not a benchmark row: {error}") from error
            rows.pop(key, None)
            rows[key] = row
    return list(rows.values())


def write(paths: Iterable[Path], page: Path | None = None) -> str:
    """Print the report; with `page`, also put it between its markers and draw the figure.

    Returns:
        The report as Markdown.
    """
    rows = load(paths)
    text = "\n\n".join(_section(rows, machine) for machine in _ordered(map(_machine, rows)))
    curve = [row for row in rows if _CURVE in row["workload"] and row["status"] == "ok"]
    if page is not None:
        if any(row["pass"] == FORWARD for row in curve if row["kind"] in (GIVEN, WHOLE)):
            figure = page.parent / FIGURE
            figure.parent.mkdir(parents=True, exist_ok=True)
            save_figure(_draw_curve(curve), figure)
            text += f"\n\n![Speed-up over dense attention against length]({FIGURE})"
        _replace(page, BEGIN, text, END)
    print(text)
    return text


def summarise(paths: Iterable[Path], readme: Path) -> str:
    """Put one row for each machine and framework between the markers of `readme`.

    Returns:
        The table as Markdown.

    Raises:
        ValueError: no whole call of a workload of the summary among the rows, or no markers.
    """
    rows = [row for row in load(paths) if row["workload"] in SUMMARY_WORKLOADS]
    header = ["machine", "tokens, heads, head dimension", "package", "forward ms", "speed-up"]
    header += ["forward+backward ms", "speed-up", "fastest dense"]
    lines = [header, [*["---"] * 3, *["---:"] * 4, "---"]]
    for machine in _ordered(map(_machine, rows)):
        mine = [row for row in rows if _machine(row) == machine]
        for framework in ("torch", "jax"):
            whole = [
                row for row in mine if row.get("kind") == WHOLE and row["framework"] == framework
            ]
            if _find(whole) is not None:
                lines.append(_summary_line(whole, mine, framework))
    if len(lines) == 2:
        names = ", ".join(SUMMARY_WORKLOADS)
        raise ValueError(f"the rows must hold a whole call of one of {names}, got none")
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    _replace(readme, SUMMARY_BEGIN, text, SUMMARY_END)
    print(text)
    return text


def _summary_line(whole: list[Row], rows: list[Row], framework: str) -> list[str]:
    about = whole[0]
    device = about["machine"]["device"]
    if not about["machine"].get("driver"):
        device += f", {about['machine']['cores']} cores"
    cells = [
        device,
        f"{about['length']:,}, {about['heads']}, {about['head_dim']}",
        f"`psa_{framework}`",
    ]
    yardsticks = []
    for which in (FORWARD, BOTH):
        row, dense = _find(whole, which=which), fastest_dense(rows, framework, which)
        cells.append("-" if row is None else _ms(row["ms_median"]))
        compared = row is not None and dense is not None
        cells.append(f"{dense['ms_median'] / row['ms_median']:.2f}x" if compared else "-")
        if dense is not None:
            yardsticks.append(f"`{dense['provider']}`")
    return [*cells, " / ".join(_ordered(yardsticks)) or "-"]


def insert_demo(folder: Path, readme: Path) -> None:
    """Put the table and the picture that `psa demo` wrote to `folder` into the README."""
    _replace(readme, DEMO_BEGIN, (folder / "demo.md").read_text(encoding="utf-8").strip(), DEMO_END)
    figure = readme.parent / DEMO_FIGURE
    figure.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "demo.png", figure)


def _section(rows: list[Row], machine: str) -> str:
    rows = [row for row in rows if _machine(row) == machine]
    parts = [f"**{machine}** ({_versions(rows[-1])})"]
    for workload in _ordered(row["workload"] for row in rows):
        mine = [row for row in rows if row["workload"] == workload]
        parts.append(_table(workload, mine))
        parts += filter(None, [_rooms(mine), _left_out(mine)])
    return "\n\n".join(parts)


def _table(workload: str, rows: list[Row]) -> str:
    about = rows[0]
    heads = str(about["heads"])
    if about["kv_heads"] != about["heads"]:
        heads += f" (key/value {about['kv_heads']})"
    causal = ", causal" if about["causal"] else ""
    title = (
        f"`{workload}`: {about['length']:,} tokens, heads {heads}, head dimension "
        f"{about['head_dim']}, {about['dtype']}{causal}"
    )
    passes = [which for which in (FORWARD, BACKWARD, BOTH) if _find(rows, which=which)]
    header = ["provider", "density"]
    for which in passes:
        header += [f"{which} ms", "speed-up"]
    header += ["TFLOP/s (forward)", "error against dense", "peak MiB"]
    timed_host = any(row.get("host_ms") is not None for row in rows)
    if timed_host:
        header.append("host ms (forward)")
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for name in _ordered(row["provider"] for row in rows if row.get("kind") != PART):
        timed = {which: _find(rows, name, which) for which in passes}
        if timed.get(FORWARD) is None:
            continue
        first = timed[FORWARD]
        cells = [f"{name} ({first['kind']})", f"{first['density']:.1%}"]
        for which in passes:
            cells += _time_cells(timed[which], rows, which)
        last = next(timed[which] for which in reversed(passes) if timed[which] is not None)
        peak = "-" if last["peak_bytes"] is None else f"{last['peak_bytes'] / 2**20:,.0f}"
        compared = first["kind"] != DENSE and first["error_dense"] is not None
        error = f"{first['error_dense']:.3f}" if compared else "-"
        cells += [f"{first['tflops_per_s']:.3g}", error, peak]
        if timed_host:
            host = first.get("host_ms")
            cells.append("-" if host is None else f"{host:.3g}")
        lines.append(cells)
    return title + "\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _time_cells(row: Row | None, rows: list[Row], which: str) -> list[str]:
    if row is None:
        return ["-", "-"]
    spread = f"{_ms(row['ms_median'])} ({_ms(row['ms_p20'])}-{_ms(row['ms_p80'])})"
    dense = fastest_dense(rows, row["framework"], which)
    if dense is None:
        return [spread, "-"]
    return [spread, f"{dense['ms_median'] / row['ms_median']:.2f}x"]


def fastest_dense(rows: list[Row], framework: str, which: str) -> Row | None:
    """The framework's quickest dense row of a pass: what speed-ups are measured against."""
    dense = [
        row
        for row in rows
        if row.get("kind") == DENSE
        and row["framework"] == framework
        and row["pass"] == which
        and row["status"] == "ok"
    ]
    return min(dense, key=lambda row: row["ms_median"], default=None)


def _rooms(rows: list[Row]) -> str:
    """The rooms of the forward call beside attention, one line per framework."""
    lines = []
    for framework in ("torch", "jax"):
        rooms = [
            f"{row['provider'].removeprefix(f'{framework}-part-')} {_ms(row['ms_median'])}"
            for row in rows
            if row.get("kind") == PART and row["framework"] == framework and row["status"] == "ok"
        ]
        if rooms:
            lines.append(f"Parts of the {framework} call, ms: {', '.join(rooms)}.")
    return "  \n".join(lines)


def _left_out(rows: list[Row]) -> str:
    reasons = {
        row["provider"]: f"{row['status']}: {row['reason']}"
        for row in rows
        if row["status"] != "ok" and row.get("reason")
    }
    if not reasons:
        return ""
    return "Not in the table: " + "; ".join(f"{name} ({why})" for name, why in reasons.items())


def _find(rows: list[Row], name: str | None = None, which: str = FORWARD) -> Row | None:
    for row in rows:
        named = name is None or row["provider"] == name
        if named and row.get("pass") == which and row["status"] == "ok" and row["kind"] != PART:
            return row
    return None


def _draw_curve(rows: list[Row]) -> Any:
    """Speed-up against length, a panel for each machine: their runs are not compared."""
    plt = require_pyplot()
    machines = _ordered(row["machine"]["device"] for row in rows)
    names = _ordered(row["provider"] for row in rows if row["kind"] in (BINARY, GIVEN, WHOLE))
    with style():
        size = (0.4 + 3.8 * len(machines), 3.0)
        figure, panels = plt.subplots(
            1, len(machines), figsize=size, layout="constrained", sharey=True, squeeze=False
        )
        for ax, machine in zip(panels[0], machines, strict=True):
            _draw_panel(ax, [row for row in rows if row["machine"]["device"] == machine], names)
            ax.set_title(machine)
        panels[0, 0].set_ylabel("speed-up over the fastest dense")
        panels[0, 0].set_ylim(bottom=0)
        # One legend for all panels: a provider may have run on one of the machines only.
        lines = {
            label: line
            for ax in panels[0]
            for line, label in zip(*ax.get_legend_handles_labels(), strict=True)
        }
        figure.legend(lines.values(), lines.keys(), loc="outside right upper", frameon=False)
    return figure


def _draw_panel(ax: Any, rows: list[Row], names: list[str]) -> None:
    for index, name in enumerate(names):
        points = []
        for row in rows:
            if row["provider"] != name or row["pass"] != FORWARD:
                continue
            same = [other for other in rows if other["workload"] == row["workload"]]
            dense = fastest_dense(same, row["framework"], FORWARD)
            if dense is not None:
                points.append((row["length"], dense["ms_median"] / row["ms_median"]))
        if points:
            ax.plot(
                *zip(*sorted(points), strict=True),
                label=name,
                color=LINE_COLOURS[index % len(LINE_COLOURS)],
                marker=LINE_MARKERS[index % len(LINE_MARKERS)],
                markersize=3.5,
                linewidth=1.2,
            )
    ax.axhline(1.0, color="#888888", linewidth=0.8, linestyle="--", label="dense")
    ax.set_xscale("log", base=2)
    lengths = sorted({row["length"] for row in rows})
    ax.set_xticks(lengths, [f"{length:,}" for length in lengths])
    ax.minorticks_off()
    ax.set_xlabel("tokens")
    ax.grid(axis="y", linewidth=0.4, color="#dddddd")


def _replace(readme: Path, begin: str, text: str, end: str) -> None:
    before, found, rest = readme.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{readme} must hold the lines {begin} and {end}")
    scratch = readme.with_suffix(".tmp")
    scratch.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
    os.replace(scratch, readme)


def _machine(row: Row) -> str:
    about = row["machine"]
    driver = f", driver {about['driver']}" if about.get("driver") else f", {about['cores']} cores"
    return f"{about['device']}{driver}"


def _versions(row: Row) -> str:
    versions = {"Python": row["machine"]["python"], **row["machine"]["versions"]}
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version)


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _ordered(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
