"""Does a token order help? Error against dense attention at equal density, on a real clip.

    python -m benchmarks.token_order --clip bigbuckbunny bikes

Every order gets the same `topk` ratios, so every row of every head keeps the same number of blocks
at each level: the orders differ in which tokens share a block, and in nothing else.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from shared_specs.config import REARRANGE_METHODS, PSAConfig
from shared_specs.masks import density, from_segments
from shared_specs.tools.demo.clip import SHIPPED, read_frames, shipped_clip
from shared_specs.tools.demo.masks import scaled
from shared_specs.tools.demo.tokens import TEMPERATURES, video_tokens
from shared_specs.tools.figures import plot_error_by_density, require_pyplot, save_figure, style

FACTORS = (1 / 3, 2 / 3, 1.0, 1.5, 2.0)
"""The default ratios times these make the curve; 1 is the row of the table."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One order at one density on one clip."""

    clip: str
    order: str
    factor: float
    density: float
    error: float
    error_by_temperature: dict[str, float]


def load(clip: str, *, frames: int, patches: int) -> tuple:
    """Tensors q, k, v of a clip, and its grid.

    Args:
        clip: a shipped clip's name or a video file.
        frames: frames of the clip.
        patches: tokens per frame, at least.
    """
    import torch

    path = shipped_clip(clip) if clip in SHIPPED else Path(clip)
    *tokens, grid = video_tokens(read_frames(path, count=frames, patches=patches, patch=16))
    return *map(torch.from_numpy, tokens), grid


def mass_on_own_token(q, k) -> dict[str, float]:
    """Share of a query's attention that goes to the key of its own token, per temperature."""
    shares: dict[str, list[float]] = {}
    for head, (rows, columns) in enumerate(zip(q[0], k[0], strict=True)):
        logits = (rows @ columns.mT) * q.shape[-1] ** -0.5
        mass = (logits.diagonal() - logits.logsumexp(-1)).exp().mean()
        shares.setdefault(f"{TEMPERATURES[head % len(TEMPERATURES)]:g}", []).append(float(mass))
    return {temperature: sum(mass) / len(mass) for temperature, mass in shares.items()}


def measure(clip: str, q, k, v, grid: tuple[int, int, int]) -> Iterator[Row]:
    """Errors of every order at every density."""
    import torch

    from psa_torch import psa_attention

    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v).double()
    for name, moved, undo in _orders(q, k, v, grid):
        for factor in FACTORS:
            out, levels = psa_attention(
                *moved, config=scaled(PSAConfig(), factor), return_levels=True
            )
            wrong = (undo(out).double() - dense).square()
            yield Row(
                clip=Path(clip).stem,
                order=name,
                factor=factor,
                density=density(from_segments(levels.numpy())),
                error=float((wrong.sum() / dense.square().sum()).sqrt()),
                error_by_temperature=_by_temperature(wrong, dense),
            )


def _orders(q, k, v, grid) -> Iterator[tuple[str, tuple, Callable]]:
    """Name, moved q, k, v and the way back of every order."""
    from psa_torch.order import TokenOrder

    for method in REARRANGE_METHODS:
        config = PSAConfig(rearrange_method=method, grid=grid)
        order = TokenOrder.from_config(config, q.shape[2], k.shape[2])
        *moved, state = order.apply(q, k, v)
        yield method or "none", moved, partial(order.undo, state=state)


def _by_temperature(wrong, dense) -> dict[str, float]:
    """Relative error of the heads of each temperature."""
    heads = zip(wrong.sum((0, 2, 3)), dense.square().sum((0, 2, 3)), strict=True)
    sums: dict[float, list] = {}
    for head, pair in enumerate(heads):
        sums.setdefault(TEMPERATURES[head % len(TEMPERATURES)], []).append(pair)
    return {
        f"{temperature:g}": float((sum(x for x, _ in pairs) / sum(y for _, y in pairs)) ** 0.5)
        for temperature, pairs in sums.items()
    }


def table(rows: list[Row]) -> str:
    """Markdown: a line per clip and order, at the default ratios."""
    lines = [
        "| clip | order | error | against none | "
        + " | ".join(f"heads at {temperature:g}" for temperature in TEMPERATURES)
        + " |",
        "|---" * (4 + len(TEMPERATURES)) + "|",
    ]
    rows = [row for row in rows if row.factor == 1.0]
    none = {row.clip: row.error for row in rows if row.order == "none"}
    for row in rows:
        cells = [row.clip, row.order, f"{row.error:.3f}"]
        cells.append(f"{100 * (row.error / none[row.clip] - 1):+.0f} %")
        cells += [f"{error:.3f}" for error in row.error_by_temperature.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(rows: list[Row]) -> Any:
    """Error over density, a panel per clip; returns the figure."""
    clips = list(dict.fromkeys(row.clip for row in rows))
    with style():
        figure, axes = require_pyplot().subplots(
            1, len(clips), figsize=(2.6 * len(clips) + 1.8, 2.6), layout="constrained"
        )
        axes = [axes] if len(clips) == 1 else list(axes)
        for clip, ax in zip(clips, axes, strict=True):
            curves: dict[str, list[tuple[float, float]]] = {}
            for row in rows:
                if row.clip == clip:
                    curves.setdefault(row.order, []).append((row.density, row.error))
            plot_error_by_density(curves, ax=ax)
            ax.get_legend().remove()
            # The orders differ by percents and by factors: only a log scale shows both.
            ax.set_yscale("log")
            ax.set_ylim(bottom=0.8 * min(row.error for row in rows), top=1)
            ax.set_yticks([0.05, 0.1, 0.2, 0.5, 1], labels=["0.05", "0.1", "0.2", "0.5", "1"])
            ax.minorticks_off()
            ax.set_title(clip)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right", frameon=False)
    return figure


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table, write figure, table and rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clip", nargs="+", default=["bigbuckbunny", "bikes"])
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--patches", type=int, default=576, help="tokens per frame, at least")
    parser.add_argument("--output", type=Path, default=Path("outputs/token-order"))
    args = parser.parse_args(argv)
    rows, own_token = [], {}
    for clip in args.clip:
        q, k, v, grid = load(clip, frames=args.frames, patches=args.patches)
        own_token[clip] = mass_on_own_token(q, k)
        for row in measure(clip, q, k, v, grid):
            print(f"{row.clip}  {row.order:14}  density {row.density:.3f}  error {row.error:.4f}")
            rows.append(row)
    args.output.mkdir(parents=True, exist_ok=True)
    save_figure(draw(rows), args.output / "token-order.png")
    (args.output / "token-order.md").write_text(table(rows), encoding="utf-8")
    report = {
        "machine": describe("cpu"),
        "mass_on_own_token": own_token,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    (args.output / "token-order.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    print(table(rows))
    for clip, shares in own_token.items():
        text = ", ".join(f"{share:.2f} at {name}" for name, share in shares.items())
        print(f"{clip}: attention to the own token: {text}")


if __name__ == "__main__":
    main()
