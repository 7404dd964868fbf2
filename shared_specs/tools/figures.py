"""Pictures of level masks and of errors, in a style fit for print.

matplotlib is imported when a figure is asked for, never before (extra `viz`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from shared_specs.constants import MASK_LEVELS
from shared_specs.masks import SEPARATOR, check_levels, from_segments
from shared_specs.records import DensityRecords

# One hue, darker where more keys are kept, so that a mask reads the same in grey.
LEVEL_COLOURS = {1: "#08306b", 2: "#2b7bba", 4: "#7ab6d9", 8: "#cfe1f2", 0: "#ffffff"}
LEVEL_LABELS = {1: "every key", 2: "means of 2", 4: "means of 4", 8: "means of 8", 0: "skipped"}
LINE_COLOURS = ("#08306b", "#d1495b", "#edae49", "#00798c", "#6a4c93", "#5c5c5c")
LINE_MARKERS = ("o", "s", "^", "D", "v", "P")

_STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "pdf.fonttype": 42,
    "savefig.dpi": 200,
}


def require_pyplot() -> Any:
    """`matplotlib.pyplot`.

    Raises:
        ImportError: matplotlib is missing; the message names the extra that brings it.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "figures need matplotlib: pip install 'pyramid-sparse-attention[viz]'"
        ) from error
    return plt


def style() -> Any:
    """Context manager with the style of every figure of this project."""
    return require_pyplot().rc_context(_STYLE)


def plot_levels(
    levels: Any,
    ax: Any = None,
    *,
    titles: Sequence[str] | None = None,
    legend: bool = True,
) -> Any:
    """Draw a level mask: query blocks down, key blocks across, darker where more is kept.

    Args:
        levels: int `[Nq, Nk]` or `[..., Nq, Nk]` (one panel per head), values in
            {0, 1, 2, 4, 8}, or the segment form `[..., Nq, Nk + 5]`. NumPy, torch or JAX.
        ax: matplotlib Axes to draw on; for several heads a sequence of as many Axes. None makes
            a figure.
        titles: one title per panel; default: 'head i, density d' where there are several.
        legend: whether to add the key of the five levels.

    Returns:
        The Axes drawn on: one, or an array of them if `levels` has leading dimensions.

    Raises:
        ImportError: matplotlib is missing (extra `viz`).
        TypeError, ValueError: `levels` is not a level mask, or `ax` or `titles` do not fit it.
    """
    masks = _as_masks(levels)
    several = masks.ndim > 2
    panels = masks.reshape(-1, *masks.shape[-2:])
    if titles is not None and len(titles) != len(panels):
        raise ValueError(f"titles must hold {len(panels)} names, got {len(titles)}")
    plt = require_pyplot()
    with style():
        axes = _level_axes(plt, ax, panels)
        for index, (panel, panel_ax) in enumerate(zip(panels, axes, strict=True)):
            _draw_levels(panel, panel_ax)
            if titles is not None:
                panel_ax.set_title(titles[index])
            elif several:
                panel_ax.set_title(f"head {index}, density {_density(panel):.1%}")
        if legend:
            _level_legend(axes[0].figure, axes, panels)
    return np.asarray(axes, dtype=object) if several else axes[0]


def plot_error_by_density(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    ax: Any = None,
    *,
    ylabel: str = "relative error against dense",
) -> Any:
    """Draw one line per method through its (density, error) points.

    Args:
        curves: method -> (density, error) pairs, densities in [0, 1].
        ax: matplotlib Axes to draw on; None makes a figure.
        ylabel: what the error is.

    Returns:
        The Axes drawn on.

    Raises:
        ImportError: matplotlib is missing (extra `viz`).
    """
    plt = require_pyplot()
    with style():
        if ax is None:
            ax = plt.subplots(figsize=(3.4, 2.6), layout="constrained")[1]
        for index, (name, points) in enumerate(curves.items()):
            x, y = zip(*sorted(points), strict=True)
            ax.plot(
                [100 * value for value in x],
                y,
                label=name,
                color=LINE_COLOURS[index % len(LINE_COLOURS)],
                marker=LINE_MARKERS[index % len(LINE_MARKERS)],
                markersize=3.5,
                linewidth=1.2,
            )
        ax.set_xlabel("density (%)")
        ax.set_ylabel(ylabel)
        ax.set_ylim(bottom=0)
        ax.grid(axis="y", linewidth=0.4, color="#dddddd")
        ax.set_axisbelow(True)
        ax.legend(frameon=False)
    return ax


def plot_density(records: DensityRecords, path: Any = None, ax: Any = None) -> Any:
    """Draw the density of a video model over its layers and steps.

    Args:
        records: what its layers computed.
        path: where to save the figure; None saves nothing.
        ax: matplotlib Axes to draw on; None makes a figure.

    Returns:
        The Axes drawn on.

    Raises:
        ImportError: matplotlib is missing (extra `viz`).
        ValueError: there are no records.
    """
    if not len(records):
        raise ValueError("records must hold at least one density, got none")
    layers, steps, density = records.by_layer_and_step()
    plt = require_pyplot()
    with style():
        if ax is None:
            size = (2 + 0.15 * len(steps), 1.2 + 0.15 * len(layers))
            ax = plt.subplots(figsize=size, layout="constrained")[1]
        image = ax.imshow(density, vmin=0, vmax=1, aspect="auto", cmap="Blues")
        ax.set_xticks(range(len(steps)), steps, rotation=90)
        ax.set_yticks(range(len(layers)), layers)
        ax.set_xlabel("denoising step")
        ax.set_ylabel("layer")
        ax.figure.colorbar(image, ax=ax, label="density, mean over heads")
        if path is not None:
            ax.figure.savefig(path)
    return ax


def save_figure(figure: Any, path: Any) -> None:
    """Write a figure to `path` (its suffix names the format) and free it."""
    with style():
        figure.savefig(path, bbox_inches="tight")
    require_pyplot().close(figure)


def _as_masks(levels: Any) -> np.ndarray:
    if hasattr(levels, "detach"):  # a torch tensor, which may live on another device
        levels = levels.detach().cpu()
    masks = np.asarray(levels)
    if masks.ndim < 2 or masks.size == 0:
        raise ValueError(f"levels must be [..., Nq, Nk] and not empty, got shape {masks.shape}")
    if np.issubdtype(masks.dtype, np.integer) and (masks == SEPARATOR).any():
        masks = from_segments(masks)
    check_levels(masks)
    return masks


def _density(mask: np.ndarray) -> float:
    return float(np.where(mask > 0, 1.0 / np.maximum(mask, 1), 0.0).mean())


def _level_axes(plt: Any, ax: Any, panels: np.ndarray) -> list[Any]:
    count = len(panels)
    if ax is None:
        columns = min(count, 4)
        rows = math.ceil(count / columns)
        figure, grid = plt.subplots(
            rows,
            columns,
            figsize=(max(3.0, 1.75 * columns), 1.9 * rows + 0.6),
            squeeze=False,
            layout="constrained",
        )
        for unused in grid.flat[count:]:
            figure.delaxes(unused)
        return list(grid.flat[:count])
    axes = list(np.ravel(np.asarray(ax, dtype=object)))
    if len(axes) != count:
        raise ValueError(f"ax must hold one Axes per mask, {count} in all, got {len(axes)}")
    return axes


def plot_parity(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
    """Errors of every implementation as multiples of their limit, one panel per dtype.

    Args:
        results: from `tools.parity.run_parity`.

    Returns:
        The figure: a row per implementation, a column per output; each cell is the worst error
        over the workloads divided by what is accepted, on a logarithmic scale.
    """
    plt = require_pyplot()
    rows = [row for row in results["errors"] if "relative" in row]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    outputs = list(dict.fromkeys(row["output"] for row in rows))
    with style():
        figure, axes = plt.subplots(
            1,
            len(dtypes),
            figsize=(3.0 * len(dtypes) + 0.8, 0.5 * len(names) + 1.4),
            squeeze=False,
            layout="constrained",
        )
        for ax, dtype in zip(axes[0], dtypes, strict=True):
            share = np.full((len(names), len(outputs)), np.nan)
            for row in rows:
                if row["dtype"] == dtype:
                    at = names.index(row["implementation"]), outputs.index(row["output"])
                    share[at] = np.fmax(share[at], row["relative"] / row["limit"])
            image = ax.imshow(np.log10(share), cmap="RdYlBu_r", vmin=-2, vmax=2, aspect="auto")
            for at in np.argwhere(np.isfinite(share)):
                ax.text(at[1], at[0], f"{share[tuple(at)]:.2g}", ha="center", va="center")
            ax.set_title(dtype)
            ax.set_xticks(range(len(outputs)), outputs)
            ax.set_yticks(range(len(names)), names if ax is axes[0][0] else [""] * len(names))
        figure.colorbar(image, ax=list(axes[0]), label="log10(error / accepted)")
    return figure


def _draw_levels(mask: np.ndarray, ax: Any) -> None:
    from matplotlib.colors import ListedColormap

    rank = np.zeros(mask.shape, np.uint8)
    for index, level in enumerate(MASK_LEVELS):
        rank[mask == level] = index
    rows, columns = mask.shape
    ax.imshow(
        rank,
        cmap=ListedColormap([LEVEL_COLOURS[level] for level in MASK_LEVELS]),
        vmin=-0.5,
        vmax=len(MASK_LEVELS) - 0.5,
        interpolation="nearest",
        aspect=columns / rows,
    )
    for side in ("top", "right"):
        ax.spines[side].set_visible(True)
    ax.set_xticks([0, columns - 1] if columns > 1 else [0])
    ax.set_yticks([0, rows - 1] if rows > 1 else [0])
    ax.set_xlabel("key block", labelpad=-4 if columns > 1 else 2)
    ax.set_ylabel("query block", labelpad=-6 if rows > 1 else 2)


def _level_legend(figure: Any, axes: Sequence[Any], panels: np.ndarray) -> None:
    from matplotlib.patches import Patch

    present = [level for level in MASK_LEVELS if (panels == level).any()]
    handles = [
        Patch(facecolor=LEVEL_COLOURS[level], edgecolor="#888888", linewidth=0.4)
        for level in present
    ]
    labels = [LEVEL_LABELS[level] for level in present]
    shape = {"ncols": len(present), "frameon": False, "handlelength": 1.0, "columnspacing": 1.0}
    if figure.get_layout_engine() is not None:
        figure.legend(handles, labels, loc="outside lower center", **shape)
    else:
        axes[-1].legend(
            handles, labels, loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False
        )
