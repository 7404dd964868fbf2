"""The benchmark of a denoising step, on a tiny geometry: it checks before it times."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from benchmarks import model_step  # noqa: E402

ROWS = ["dense-default", "psa-topk15-gilbert-once-a-model", "psa-topk15-gilbert-in-every-layer"]


def test_rows_are_of_a_checked_model_and_say_what_they_cost(tmp_path, capsys):
    output = tmp_path / "rows.jsonl"
    arguments = ["--device", "cpu", "--model", "tiny", "--repeats", "1", "--output", str(output)]
    assert model_step.main([*arguments, "--row", *ROWS]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["provider"] for row in rows] == ROWS
    for row in rows:
        assert row["errors"]["level 1"] < 1e-5 and row["tokens"] == 288
        assert 0 < row["attention_ms"] and len(row["step_ms"]) == 1
    assert "density" not in rows[0]
    assert rows[1]["density"] == pytest.approx(rows[2]["density"]) and 0 < rows[1]["density"] < 0.5
    assert "tiny, 2 layers, 288 tokens" in capsys.readouterr().out


def test_a_model_that_level_one_does_not_reproduce_is_not_timed(monkeypatch):
    monkeypatch.setattr(model_step, "LEVEL_ONE", model_step.CONFIG)
    with pytest.raises(ValueError, match="level 1 differs from dense attention"):
        next(model_step.run(["tiny"], "cpu", rows=ROWS, repeats=1, layers=None))


def test_tokens_left_out_of_order_are_not_timed(monkeypatch):
    monkeypatch.setattr(model_step, "gilbert_order", lambda grid: np.arange(math.prod(grid)))
    with pytest.raises(ValueError, match="level 1 differs from dense attention"):
        next(model_step.run(["tiny"], "cpu", rows=ROWS, repeats=1, layers=None))


def test_weights_and_rotary_tables_have_values():
    model = model_step.build(model_step.MODELS["tiny"], "cpu", torch.bfloat16)
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
    ],
)
def test_geometries_are_those_that_were_published(name, tokens, billions):
    from diffusers import WanTransformer3DModel

    geometry = model_step.MODELS[name]
    one, two = (dataclasses.replace(geometry, layers=n) for n in (1, 2))

    def parameters(geometry):
        with torch.device("meta"):
            model = WanTransformer3DModel(**model_step.arguments_of(geometry))
        return sum(p.numel() for p in model.parameters())

    each = parameters(two) - parameters(one)
    total = parameters(one) + (geometry.layers - 1) * each
    assert geometry.tokens == tokens and total / 1e9 == pytest.approx(billions, abs=0.01)
