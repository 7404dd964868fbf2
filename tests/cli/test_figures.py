"""Figures: what is drawn is what the mask holds."""

import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex

from shared_specs.masks import to_segments
from shared_specs.records import DensityRecord, DensityRecords
from shared_specs.tools.figures import (
    LEVEL_COLOURS,
    plot_density,
    plot_error_by_density,
    plot_levels,
    save_figure,
)

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def random_levels(rng, *shape):
    return rng.choice(np.int32([0, 1, 2, 4, 8]), shape)


def drawn_colours(ax):
    image = ax.images[0]
    pixels = image.cmap(image.norm(image.get_array()))
    return np.array([[to_hex(pixel) for pixel in row] for row in pixels])


def expected_colours(mask):
    return np.vectorize(LEVEL_COLOURS.get)(mask)


def test_each_level_has_its_colour_in_its_place(rng):
    mask = random_levels(rng, 9, 14)
    assert (drawn_colours(plot_levels(mask)) == expected_colours(mask)).all()


def test_segments_draw_the_same_picture(rng):
    mask = random_levels(rng, 5, 8)
    assert (drawn_colours(plot_levels(to_segments(mask))) == expected_colours(mask)).all()


def test_one_panel_per_head_on_axes_of_ones_own(rng):
    masks = random_levels(rng, 1, 3, 6, 10)
    axes = plt.subplots(1, 3)[1]
    drawn = plot_levels(masks, axes, titles=["a", "b", "c"])
    assert list(drawn) == list(axes)
    for ax, mask, title in zip(drawn, masks[0], "abc", strict=True):
        assert (drawn_colours(ax) == expected_colours(mask)).all()
        assert ax.get_title() == title


def test_legend_names_only_the_levels_present():
    figure = plot_levels(np.int32([[1, 8], [8, 1]])).figure
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "every key",
        "means of 8",
    ]


@pytest.mark.parametrize(
    ("levels", "error", "message"),
    [
        (np.int32([[1, 3]]), ValueError, "0, 1, 2, 4 or 8"),
        (np.float32([[1, 2]]), TypeError, "integer"),
        (np.int32([1, 2]), ValueError, r"\[..., Nq, Nk\]"),
        (np.zeros((0, 4), np.int32), ValueError, "not empty"),
    ],
)
def test_what_is_not_a_mask_is_refused(levels, error, message):
    with pytest.raises(error, match=message):
        plot_levels(levels)


def test_axes_and_titles_must_fit_the_masks(rng):
    masks = random_levels(rng, 2, 4, 4)
    with pytest.raises(ValueError, match="one Axes per mask, 2"):
        plot_levels(masks, plt.subplots()[1])
    with pytest.raises(ValueError, match="titles must hold 2"):
        plot_levels(masks, titles=["one"])


def test_error_curves_are_sorted_by_density_and_saved(tmp_path):
    ax = plot_error_by_density({"pyramid": [(0.3, 0.1), (0.1, 0.2)], "binary": [(0.2, 0.3)]})
    assert ax.lines[0].get_xdata() == pytest.approx([10, 30])
    assert ax.lines[0].get_ydata() == pytest.approx([0.2, 0.1])
    save_figure(ax.figure, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_density_is_drawn_over_layers_and_steps(rng, tmp_path):
    records = DensityRecords(
        DensityRecord(layer, step, head, float(rng.random()))
        for step in (0, 1, 4)
        for layer in ("blocks.0", "blocks.1")
        for head in range(3)
    )
    ax = plot_density(records, tmp_path / "density.png")
    assert (tmp_path / "density.png").stat().st_size > 1000
    np.testing.assert_array_equal(ax.images[0].get_array(), records.by_layer_and_step()[2])
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["blocks.0", "blocks.1"]
    with pytest.raises(ValueError, match="records must hold at least one"):
        plot_density(DensityRecords())


def test_without_matplotlib_the_extra_is_named():
    code = (
        "import sys; sys.modules['matplotlib'] = None; sys.modules['matplotlib.pyplot'] = None\n"
        "import numpy as np\n"
        "from shared_specs.tools.figures import plot_levels\n"
        "plot_levels(np.ones((2, 2), np.int32))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "pyramid-sparse-attention[viz]" in done.stderr.splitlines()[-1]
