"""The demo at small sizes: its inputs, its masks of equal cost, and a run from end to end."""

import json

import matplotlib
import numpy as np
import pytest

from shared_specs import PSAConfig
from shared_specs.masks import density
from shared_specs.selection import select_levels
from shared_specs.tools.cli import main
from shared_specs.tools.demo import report
from shared_specs.tools.demo.clip import read_frames, shipped_clip
from shared_specs.tools.demo.compare import BINARY, PYRAMID, Comparison, MethodResult
from shared_specs.tools.demo.masks import binary_of_equal_cost, scaled
from shared_specs.tools.demo.run import Size, run_demo
from shared_specs.tools.demo.tokens import video_tokens

matplotlib.use("Agg")


def test_shipped_clip_becomes_frames_of_whole_patches():
    frames = read_frames(shipped_clip("carphone"), count=5, patches=30, patch=8)
    count, height, width, channels = frames.shape
    assert (count, channels, frames.dtype) == (5, 3, np.float32)
    assert height % 8 == 0 and width % 8 == 0 and (height // 8) * (width // 8) >= 30
    assert frames.min() >= 0 and 0.5 < frames.max() <= 1
    assert np.abs(np.diff(frames, axis=0)).max() > 0.01  # frames differ, so time passes


def test_files_that_are_no_video_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.mp4"):
        read_frames(tmp_path / "none.mp4", count=2, patches=4, patch=8)
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(ValueError, match="cannot be decoded"):
        read_frames(tmp_path / "text.mp4", count=2, patches=4, patch=8)
    with pytest.raises(ValueError, match="needs at least 500"):
        read_frames(shipped_clip("carphone"), count=500, patches=4, patch=8)
    with pytest.raises(ValueError, match="clip must be one of bigbuckbunny"):
        shipped_clip("casablanca")


def test_tokens_are_normalised_rotated_and_alike_nearby(rng):
    base = rng.random((4, 6 * 8, 5 * 8, 3), dtype=np.float32)
    frames = np.repeat(base[:1], 4, axis=0) + 0.05 * base
    q, k, v, grid = video_tokens(frames, patch=8, heads=4, head_dim=32)
    assert grid == (4, 6, 5)
    assert q.shape == k.shape == v.shape == (1, 4, 120, 32)
    assert q.dtype == k.dtype == v.dtype == np.float32
    # Layer norm, which a rotation keeps: every key has norm sqrt(D), queries times temperature.
    norms = np.linalg.norm(k, axis=-1)
    assert norms == pytest.approx(np.full(norms.shape, np.sqrt(32)), rel=1e-3)
    ratio = np.linalg.norm(q[0], axis=-1).mean(-1) / np.sqrt(32)
    assert ratio == pytest.approx([1.0, 1.5, 2.0, 3.0], rel=1e-3)
    same = np.array_equal(k[0, 0, :30], k[0, 0, 30:60])
    assert not same  # the same patch a frame later has another rotary position
    assert all(
        np.array_equal(x, y)
        for x, y in zip(
            video_tokens(frames, patch=8, heads=4, head_dim=32)[:3], (q, k, v), strict=True
        )
    )


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_binary_mask_has_the_best_blocks_at_just_the_cost(rng, factor):
    config = scaled(PSAConfig(), factor)
    scores = rng.random((1, 2, 4, 40), dtype=np.float32)
    lengths = {"q_len": 4 * 128, "kv_len": 40 * 64}
    levels = select_levels(scores, config, **lengths)
    binary = select_levels(scores, binary_of_equal_cost(config, levels), **lengths)
    assert set(np.unique(binary)) == {0, 1}
    assert 0 <= density(binary) - density(levels) < 1 / 40
    kept = np.where(binary == 1, scores, np.inf).min(-1)
    dropped = np.where(binary == 0, scores, -np.inf).max(-1)
    assert (kept > dropped).all()


def test_scaling_caps_at_the_whole_row():
    ratios = scaled(PSAConfig(), 4.0).mask_ratios
    assert ratios[1] == (0.0, 0.4) and ratios[8] == (pytest.approx(0.6), 1.0)
    assert ratios[0] == (1.0, 1.0)


def made_up_comparison(pyramid_errors, binary_errors):
    def result(error):
        return MethodResult(
            density=0.15,
            error=float(np.mean(error)),
            error_by_head=error,
            psnr=30.0,
            whole_blocks=2.5,
            seconds={"PyTorch": 0.2},
        )

    methods = {PYRAMID: result(pyramid_errors), BINARY: result(binary_errors)}
    return Comparison(
        shape=(1, 2, 1024, 64),
        dense_seconds={"PyTorch": 1.0},
        methods=methods,
        curves={name: [judged] for name, judged in methods.items()},
        levels=np.ones((1, 2, 8, 16), np.int32),
        frameworks_differ=None,
        levels_agree=None,
    )


def test_the_verdict_follows_the_errors():
    won = " ".join(report.notes(made_up_comparison([0.1, 0.3], [0.4, 0.4])))
    assert "50% less error" in won and "NOT" not in won and "binary is at least level" not in won
    lost = " ".join(report.notes(made_up_comparison([0.4, 0.8], [0.5, 0.3])))
    assert "does NOT win: 50% more" in lost
    assert "density 15% (2.5 of 16 blocks of a row whole, binary 2.5)" in lost
    assert "1 of 2 (heads 1; temperature 1.5)" in lost


def test_table_divides_dense_by_sparse_time():
    header, rows = report.table_rows(made_up_comparison([0.1, 0.1], [0.2, 0.2]))
    pyramid = dict(zip(header, rows[1], strict=True))
    assert pyramid["PyTorch ms"] == "200" and pyramid["speed-up"] == "5.0x"
    assert pyramid["rel. error"] == "0.100" and pyramid["density"] == "15.0 %"


@pytest.mark.timeout(280)
def test_demo_runs_from_clip_to_figure(tmp_path, capsys):
    size = Size(frames=4, patches=96, patch=16, heads=2, head_dim=32, repeats=1)
    run_demo(clip="carphone", output=tmp_path, size=size)
    printed = capsys.readouterr().out
    for expected in ("PyTorch ms", "JAX ms", "pyramid (levels 0 1 2 4 8)", "binary (levels 0 1)"):
        assert expected in printed
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "| binary (levels 0 1) |" in (tmp_path / "demo.md").read_text()
    data = json.loads((tmp_path / "demo.json").read_text())
    assert set(data["methods"]) == {PYRAMID, BINARY}
    assert data["frameworks_differ"][PYRAMID] < 1e-4 and data["levels_agree"] >= 0.999
    assert 0 < data["levels"]["0"] < 1
    errors = [data["methods"][name]["error"] for name in (PYRAMID, BINARY)]
    assert all(0 < error < 1 for error in errors)


def test_demo_command_says_what_is_wrong(tmp_path, capsys):
    assert main(["demo", "--video", str(tmp_path / "none.mp4"), "--output", str(tmp_path)]) == 1
    assert "none.mp4" in capsys.readouterr().err
