"""The benchmark of a denoising step, on a tiny geometry: it checks before it times."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from benchmarks import model_step, step_models  # noqa: E402

ROWS = ["dense-default", "psa-topk15-gilbert-once-a-model", "psa-topk15-gilbert-in-every-layer"]


@pytest.mark.parametrize(("model", "tokens"), [("tiny-wan", 288), ("tiny-cogvideox", 295)])
def test_rows_are_of_a_checked_model_and_say_what_they_cost(tmp_path, capsys, model, tokens):
    output = tmp_path / "rows.jsonl"
    arguments = ["--device", "cpu", "--model", model, "--repeats", "1", "--output", str(output)]
    assert model_step.main([*arguments, "--row", *ROWS]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["provider"] for row in rows] == ROWS
    for row in rows:
        assert row["errors"]["level 1"] < 1e-5 and row["tokens"] == tokens
        assert 0 < row["attention_ms"] and len(row["step_ms"]) == 1
    assert "density" not in rows[0]
    assert rows[1]["density"] == pytest.approx(rows[2]["density"]) and 0 < rows[1]["density"] < 0.6
    assert f"{model}, 2 layers, {tokens} tokens" in capsys.readouterr().out


def test_rows_that_keep_their_choice_or_are_compiled(tmp_path, capsys):
    output = tmp_path / "rows.jsonl"
    rows = ["compiled-psa-topk15-gilbert", "psa-topk15-gilbert-refresh-4", "dense-cudnn"]
    arguments = ["--device", "cpu", "--model", "tiny-wan", "--repeats", "1"]
    arguments += ["--output", str(output), "--compiler", "aot_eager"]
    assert model_step.main([*arguments, "--row", *rows]) == 0
    found = {row["provider"]: row for row in map(json.loads, output.read_text().splitlines())}
    assert list(found)[-1] == rows[0]  # compiled rows come last
    assert len(found[rows[1]]["step_ms"]) == 4 and 0 < found[rows[1]]["density"] < 0.5
    assert "attention_ms" in found[rows[2]] and "attention_ms" not in found[rows[0]]
    assert "compiled-psa" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["tiny-wan", "tiny-cogvideox"])
def test_a_model_that_level_one_does_not_reproduce_is_not_timed(monkeypatch, model):
    monkeypatch.setattr(model_step, "LEVEL_ONE", model_step.CONFIG)
    with pytest.raises(ValueError, match="level 1 differs from dense attention"):
        next(model_step.run([model], "cpu", rows=ROWS, repeats=1, layers=None))


def test_tokens_left_out_of_order_are_not_timed(monkeypatch):
    monkeypatch.setattr(model_step, "gilbert_order", lambda grid: np.arange(math.prod(grid)))
    with pytest.raises(ValueError, match="level 1 differs from dense attention"):
        next(model_step.run(["tiny-wan"], "cpu", rows=ROWS, repeats=1, layers=None))


def test_weights_and_rotary_tables_have_values():
    model = step_models.build(step_models.MODELS["tiny-wan"], "cpu", torch.bfloat16)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert torch.isfinite(tensor).all(), name
        assert (tensor.abs().sum() > 0) != name.endswith("bias"), name
    assert model.rope.freqs_cos[0].eq(1).all() and model.rope.freqs_sin[1].abs().sum() > 0
    assert model.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert model.blocks[0].scale_shift_table.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "tokens", "billions"),
    [
        ("wan2.1-1.3b-480p-81f", 32760, 1.42),
        ("wan2.1-14b-480p-81f", 32760, 14.29),
        ("wan2.1-14b-720p-81f", 75600, 14.29),
        ("cogvideox-5b-480p-49f", 17776, 5.57),
    ],
)
def test_geometries_are_those_that_were_published(name, tokens, billions):
    geometry = step_models.MODELS[name]

    def parameters(layers):
        with torch.device("meta"):
            model = step_models.make(dataclasses.replace(geometry, layers=layers))
        return sum(p.numel() for p in model.parameters())

    one, two = parameters(1), parameters(2)
    total = one + (geometry.layers - 1) * (two - one)
    assert geometry.tokens == tokens and total / 1e9 == pytest.approx(billions, abs=0.01)
