"""The psa command, in process."""

import numpy as np
import pytest

from shared_specs import PSAConfig, __version__
from shared_specs.tools.cli import main


@pytest.fixture
def saved_qk(tmp_path, rng):
    q = rng.standard_normal((2, 4, 700, 32)).astype(np.float32)
    k = rng.standard_normal((2, 2, 700, 32)).astype(np.float32)
    np.savez(tmp_path / "qk.npz", q=q, k=k)
    return tmp_path / "qk.npz"


def test_mask_draws_and_prints_each_heads_density(saved_qk, tmp_path, capsys):
    image = tmp_path / "mask.png"
    assert main(["mask", str(saved_qk), "--heads", "1", "3", "--output", str(image)]) == 0
    printed = capsys.readouterr().out
    assert "head 1, density" in printed and "head 3, density" in printed
    assert "head 0" not in printed
    assert image.read_bytes().startswith(b"\x89PNG")


def test_mask_takes_a_configuration_file(saved_qk, tmp_path, capsys):
    PSAConfig(mask_ratios={1: (0.0, 1.0)}).save(tmp_path / "all.toml")
    arguments = ["--config", str(tmp_path / "all.toml"), "--output", str(tmp_path / "mask.pdf")]
    assert main(["mask", str(saved_qk), *arguments]) == 0
    assert "head 0, density 100.0%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--heads", "4"], "--heads must be in 0..3, got 4"),
        (["--batch", "2"], "--batch must be in 0..1, got 2"),
        (["--preset", "no-such"], "no-such"),
        (["--config", "no-such.toml"], "no-such.toml"),
    ],
)
def test_mask_refuses_what_it_cannot_draw(saved_qk, tmp_path, capsys, arguments, message):
    output = tmp_path / "never.png"
    assert main(["mask", str(saved_qk), *arguments, "--output", str(output)]) == 1
    assert message in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize("kind", ["absent", "text", "one array", "no k", "wrong rank", "nan"])
def test_mask_refuses_files_that_do_not_hold_q_and_k(tmp_path, rng, capsys, kind):
    path = tmp_path / "file.npz"
    q = rng.standard_normal((1, 2, 40, 16))
    if kind == "text":
        path.write_text("neither q nor k")
    elif kind == "one array":
        with path.open("wb") as file:
            np.save(file, q)
    elif kind == "no k":
        np.savez(path, q=q)
    elif kind == "wrong rank":
        np.savez(path, q=q[0], k=q[0])
    elif kind == "nan":
        q[0, 1, 3, 2] = np.nan
        np.savez(path, q=q, k=q)
    assert main(["mask", str(path)]) == 1
    assert str(path) in capsys.readouterr().err


def test_presets_are_listed_and_printed_as_toml(capsys):
    assert main(["presets"]) == 0
    assert "wan2.1-14b" in capsys.readouterr().out
    assert main(["presets", "wan2.1-14b"]) == 0
    assert PSAConfig.from_toml(capsys.readouterr().out) == PSAConfig.preset("wan2.1-14b")
    assert main(["presets", "no-such"]) == 1
    assert "no-such" in capsys.readouterr().err


def test_info_says_what_would_run_and_why_others_would_not(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert __version__ in printed and np.__version__ in printed
    for package in ("psa_torch", "psa_jax"):
        section = printed.split(f"\n{package}\n")[1].split("\npsa_")[0]
        assert "cpu" in section and "gather would run" in section
    assert "triton: " in printed and "mosaic: " in printed


def test_version_and_usage(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0 and __version__ in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
