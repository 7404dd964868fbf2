"""The demonstration from clip to table, figure and JSON."""

from __future__ import annotations

import dataclasses
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np

from shared_specs.config import PSAConfig
from shared_specs.tools.demo import report
from shared_specs.tools.demo.clip import DEMO_EXTRA, read_frames, shipped_clip
from shared_specs.tools.demo.compare import compare, steps
from shared_specs.tools.demo.frameworks import load_frameworks
from shared_specs.tools.demo.tokens import video_tokens
from shared_specs.tools.figures import save_figure


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """How large the inputs are. The default gives at least 16 * 576 = 9,216 tokens.

    Attributes:
        frames: frames taken from the clip.
        patches: patches per frame, at least.
        patch: side of a patch in pixels.
        heads, head_dim: heads and channels per head.
        repeats: timed calls per median.
    """

    frames: int = 16
    patches: int = 576
    patch: int = 16
    heads: int = 8
    head_dim: int = 64
    repeats: int = 3


def run_demo(
    *,
    video: str | None = None,
    clip: str = "bigbuckbunny",
    output: str | Path = "outputs/demo",
    device: str = "cpu",
    config: PSAConfig | None = None,
    size: Size | None = None,
) -> None:
    """Print the table; write it, the figure and all figures as JSON to `output`.

    Args:
        video: a video file; None takes the shipped clip `clip`.
        clip: one of `clip.SHIPPED`.
        output: directory, made if absent.
        device: 'cpu' (float32) or 'gpu' (bfloat16).
        config: the pyramid configuration, default `PSAConfig()`.
        size: sizes of the inputs.

    Raises:
        ImportError: a package of the extra `demo`, or every framework, is missing.
        FileNotFoundError, ValueError: no such video, clip or device.
    """
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError as error:
        raise ImportError(f"the demo's progress bar needs rich: {DEMO_EXTRA}") from error
    config, size = config or PSAConfig(), size or Size()
    path = Path(video) if video is not None else shipped_clip(clip)
    frameworks, missing = load_frameworks(device)
    console = Console()
    with Progress(
        TextColumn("{task.description:<38}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    ) as progress:
        task = progress.add_task("decoding and making tokens", total=steps(frameworks) + 1)
        frames = read_frames(path, count=size.frames, patches=size.patches, patch=size.patch)
        q, k, v, grid = video_tokens(
            frames, patch=size.patch, heads=size.heads, head_dim=size.head_dim
        )

        def step(what: str) -> None:
            progress.update(task, description=what, advance=1)

        result = compare((q, k, v), config, frameworks, repeats=size.repeats, step=step)
        progress.update(task, description="done", advance=1)

    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    save_figure(report.draw(result, frames[len(frames) // 2]), output / "demo.png")
    caption = report.caption(result, path.name, grid, device)
    report.write_json(result, output / "demo.json", caption=caption, machine=_machine())
    table, lines = report.table_rows(result), [*report.notes(result), *missing]
    text = report.markdown(caption, table, lines)
    (output / "demo.md").write_text(text, encoding="utf-8")
    _print(console, caption, table, lines)
    console.print(f"Written to {output}: demo.png, demo.md, demo.json", highlight=False)


def _machine() -> dict[str, Any]:
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def _print(console: Any, caption: str, table: tuple[list, list], lines: list[str]) -> None:
    from rich import box
    from rich.table import Table

    header, rows = table
    # Not folded to the terminal: a table cut in half by a narrow pipe cannot be read or quoted.
    console.width = max(console.width, 110)
    drawn = Table(title=caption, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for index, name in enumerate(header):
        drawn.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        drawn.add_row(*row)
    console.print(drawn)
    for line in lines:
        console.print(line, highlight=False)
