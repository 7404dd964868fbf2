"""A run's results as text, as JSON and as one self-contained HTML page."""

from __future__ import annotations

import dataclasses
import html
import json
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from shared_specs import __version__
from shared_specs.conformance.adapter import TIERS
from shared_specs.conformance.flags import FLAGS
from shared_specs.conformance.runner import FAILED, PASSED, SKIPPED, Result, likely_mistakes
from shared_specs.conformance.suite import Case
from shared_specs.masks import from_segments

STATUSES = (PASSED, FAILED, SKIPPED)
COLOURS = {1: "#0b3c6f", 2: "#2f7dc0", 4: "#8cc0e8", 8: "#d5e8f7", 0: "#ffffff"}


def as_text(adapter_name: str, cases: Sequence[Case], results: Sequence[Result]) -> str:
    """A table by tier and rule, the reasons for skips, and every failure."""
    lines = [f"conformance of {adapter_name} (psa {__version__})", "", *_summary(cases, results)]
    failures = [r for r in results if r.status == FAILED]
    if failures:
        by_id = {case.id: case for case in cases}
        likely = likely_mistakes(cases, results)
        lines += ["", "failed:"]
        for r in failures:
            lines += [f"  {r.case} [{r.dtype}]{_size(r)}", f"    {r.message}"]
            lines += [f"    {hint}" for hint in _hints(by_id[r.case], likely)]
        lines += ["", *_diagnosis(likely)]
    return "\n".join(lines)


def _diagnosis(likely: Sequence[str]) -> list[str]:
    if not likely:
        return ["no single known mistake explains these failures"]
    lines = ["mistakes that would explain this, the likeliest first:"]
    return lines + [f"  {FLAGS[flag]}" for flag in likely]


def _hints(case: Case, likely: Sequence[str]) -> list[str]:
    """The likely mistakes that this case catches, at most three."""
    return [FLAGS[flag] for flag in likely if flag in case.flags][:3]


def _size(result: Result) -> str:
    return "" if math.isnan(result.error) else f" ({result.error:.3g} times the tolerance)"


def _summary(cases: Sequence[Case], results: Sequence[Result]) -> list[str]:
    """Counts by tier and section, and why cases were skipped."""
    by_id = {case.id: case for case in cases}
    lines = []
    lines.append(f"{'tier':<10}{'section':<9}" + "".join(f"{s:>9}" for s in STATUSES))
    for tier in TIERS:
        rules = sorted({case.rule for case in cases if case.tier == tier})
        for rule in rules:
            counts = Counter(
                r.status
                for r in results
                if (by_id[r.case].tier, by_id[r.case].rule) == (tier, rule)
            )
            lines.append(f"{tier:<10}{rule:<9}" + "".join(f"{counts[s]:>9}" for s in STATUSES))
    counts = Counter(r.status for r in results)
    lines.append(f"{'all':<19}" + "".join(f"{counts[s]:>9}" for s in STATUSES))
    skips = Counter(r.message for r in results if r.status == SKIPPED)
    if skips:
        lines += ["", "skipped:"] + [f"{n:>6}  {reason}" for reason, n in skips.most_common()]
    return lines


def as_json(adapter_name: str, cases: Sequence[Case], results: Sequence[Result]) -> str:
    """Machine-readable: one object per result, with its case's tier, rule and flags."""
    by_id = {case.id: case for case in cases}
    rows = []
    for result in results:
        row = dataclasses.asdict(result)
        row.pop("error_map")
        for name in ("error", "got", "expected"):
            row[name] = row[name] if math.isfinite(row[name]) else repr(row[name])
        case = by_id[result.case]
        rows.append(row | {"tier": case.tier, "rule": case.rule, "flags": list(case.flags)})
    counts = Counter(r.status for r in results)
    summary = {status: counts[status] for status in STATUSES}
    document = {
        "adapter": adapter_name,
        "version": __version__,
        "summary": summary,
        "results": rows,
    }
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def as_html(adapter_name: str, cases: Sequence[Case], results: Sequence[Result]) -> str:
    """One page without outside references: the table, and each failure with its pictures."""
    by_id = {case.id: case for case in cases}
    counts = Counter(r.status for r in results)
    failures = [r for r in results if r.status == FAILED]
    body = [
        f"<h1>Conformance of {html.escape(adapter_name)}</h1>",
        f"<p>{counts[PASSED]} passed, {counts[FAILED]} failed, {counts[SKIPPED]} skipped "
        f"(psa {__version__})</p>",
        f"<pre>{html.escape(chr(10).join(_summary(cases, results)))}</pre>",
    ]
    if failures:
        likely = likely_mistakes(cases, results)
        body.append(f"<pre>{html.escape(chr(10).join(_diagnosis(likely)))}</pre>")
        body.append("<h2>Failures</h2>")
        body += [_failure(by_id[r.case], r, likely) for r in failures]
    return _PAGE.format(title=html.escape(adapter_name), body="\n".join(body))


def _failure(case: Case, result: Result, likely: Sequence[str]) -> str:
    hints = "".join(f"<li>{html.escape(hint)}</li>" for hint in _hints(case, likely))
    pictures = [_mask_picture(case)]
    if result.error_map is not None:
        caption = f"error of {result.output}, multiples of the tolerance"
        pictures.append(_figure(_heat(result.error_map), caption))
    return (
        f"<section><h3>{html.escape(case.id)} <small>{result.dtype}</small></h3>"
        f"<p>section {case.rule}, tier {case.tier}{_size(result)}</p>"
        f"<p>{html.escape(result.message)}</p><ul>{hints}</ul>"
        f"<div class='row'>{''.join(pictures)}</div></section>"
    )


def _mask_picture(case: Case) -> str:
    arrays = case.arrays()
    levels = arrays.get("levels", arrays.get("expected_levels"))
    if levels is None:
        return ""
    if "segments" in case.requires.get("mask_form", []):
        levels = from_segments(levels)
    grid = levels.reshape(-1, levels.shape[-1])
    cells = [[COLOURS[int(level)] for level in row] for row in grid]
    return _figure(_cells(cells), "level mask, heads stacked (dark = level 1, white = skipped)")


def _heat(errors: np.ndarray) -> str:
    finite = np.where(np.isfinite(errors), errors, np.inf)
    cells = []
    for row in finite:
        cells.append([])
        for value in row:
            # white within the tolerance, then red by order of magnitude; black is not comparable
            if value <= 1:
                cells[-1].append("#ffffff")
            elif math.isinf(value):
                cells[-1].append("#000000")
            else:
                depth = min(int(30 * math.log10(value)) + 40, 215)
                cells[-1].append(f"#ff{215 - depth:02x}{215 - depth:02x}")
    return _cells(cells)


def _cells(colours: list[list[str]]) -> str:
    height, width = len(colours), max(map(len, colours))
    side = max(2, min(16, 480 // max(height, width)))
    rectangles = "".join(
        f'<rect x="{x * side}" y="{y * side}" width="{side}" height="{side}" fill="{colour}"/>'
        for y, row in enumerate(colours)
        for x, colour in enumerate(row)
    )
    size = f'width="{width * side}" height="{height * side}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{rectangles}</svg>'


def _figure(picture: str, caption: str) -> str:
    return f"<figure>{picture}<figcaption>{html.escape(caption)}</figcaption></figure>"


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Conformance of {title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; }}
pre {{ background: #f6f6f6; padding: 1em; overflow-x: auto; }}
section {{ border-top: 1px solid #ccc; }}
.row {{ display: flex; flex-wrap: wrap; gap: 2em; }}
figure {{ margin: 0; }} svg {{ border: 1px solid #999; background: #fff; }}
figcaption {{ color: #555; font-size: 13px; }}
</style></head><body>
{body}
</body></html>
"""
