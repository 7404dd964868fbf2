"""The benchmark measures what it says: inputs, masks of equal cost, accuracy gate, rows, report."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import report, runner
from benchmarks.accuracy import TOLERANCE, expected_spots, spot_error, spot_heads
from benchmarks.binary_masks import FLEX_BLOCK, binary_levels, block_mask
from benchmarks.inputs import make_inputs
from benchmarks.measure import host_seconds
from benchmarks.session import DENSE, GIVEN, PART, WHOLE
from benchmarks.torch_session import TorchSession
from benchmarks.workloads import BACKWARD, BOTH, FORWARD, Workload, workloads
from shared_specs import PSAConfig
from shared_specs.attention import sparse_attention
from shared_specs.importance import block_scores
from shared_specs.selection import select_levels
from shared_specs.tools.demo.baselines import chunked_dense

ROOT = Path(__file__).resolve().parents[2]


def small(**changes):
    fields = {
        "name": "small",
        "device": "cpu",
        "heads": 4,
        "kv_heads": 2,
        "length": 700,
        "head_dim": 32,
        "dtype": "float32",
        "config": PSAConfig(),
    }
    return Workload(**{**fields, **changes})


def chosen_levels(work, inputs):
    scores = block_scores(inputs["q"], inputs["k"], work.config)
    lengths = {"q_len": work.length, "kv_len": work.length}
    return scores, select_levels(scores, work.config, **lengths)


def oracle(inputs, levels, work, block_n=None):
    config = work.config
    return sparse_attention(
        inputs["q"],
        inputs["k"],
        inputs["v"],
        levels,
        block_m=config.block_m,
        block_n=block_n or config.block_n,
        is_causal=config.causal,
    )


def test_every_workload_of_the_plan_is_there():
    gpu = {(work.heads, work.kv_heads, work.length, work.head_dim) for work in workloads("gpu")}
    assert {(24, 24, n, 128) for n in (17_776, 32_768, 69_120)} <= gpu
    assert {(12, 12, 32_768, 128), (16, 16, 32_768, 64), (28, 4, 32_768, 128)} <= gpu
    assert {"gpu-preset-wan2.1-14b", "gpu-preset-cogvideox-5b"} <= {
        w.name for w in workloads("gpu")
    }
    assert len({work.name for work in workloads("gpu") + workloads("cpu")}) == 18
    assert workloads("cpu")[0].length == 8192


def test_inputs_are_structured_and_the_same_every_time():
    work = small()
    inputs, again = make_inputs(work), make_inputs(work)
    assert inputs["q"].shape == inputs["dout"].shape == (1, 4, 700, 32)
    assert inputs["k"].shape == inputs["v"].shape == (1, 2, 700, 32)
    assert all(np.array_equal(inputs[name], again[name]) for name in inputs)
    logits = inputs["q"][0, 1] @ inputs["k"][0, 0].T
    assert np.diag(logits).mean() > 3 * np.abs(np.roll(logits, 350, axis=1).diagonal()).mean()


@pytest.mark.parametrize("causal", [False, True])
def test_binary_mask_keeps_the_best_wide_blocks_at_equal_cost(causal):
    work = small(config=PSAConfig(causal=causal), length=2560)
    scores, levels = chosen_levels(work, make_inputs(work))
    binary = binary_levels(scores, levels, work)
    assert binary.shape == (1, 4, 20, 20) and set(np.unique(binary)) <= {0, 1}
    cost = np.where(levels > 0, 1 / np.maximum(levels, 1), 0).sum(-1) * work.config.block_n
    rounded = np.maximum(1, np.rint(cost / FLEX_BLOCK))
    assert np.array_equal(binary.sum(-1), rounded)
    if causal:
        assert not np.triu(binary, 1).any()
        assert all((binary[..., row, row] == 1).all() for row in range(20))


@pytest.mark.parametrize("causal", [False, True])
def test_block_mask_says_the_same_as_the_binary_levels(rng, causal):
    work = small(config=PSAConfig(causal=causal), length=700)
    binary = rng.integers(0, 2, (1, 4, 6, 6)).astype(np.int32)
    if causal:
        binary = np.tril(binary)
    mask = block_mask(binary, work, torch.device("cpu"))
    assert np.array_equal(mask.to_dense().numpy() > 0, binary > 0)
    assert mask.seq_lengths == (700, 700)
    partial = mask.kv_num_blocks.numpy()
    diagonal = binary[..., range(6), range(6)]
    assert np.array_equal(partial, diagonal if causal else np.zeros_like(diagonal))


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
def test_flex_attention_computes_the_binary_mask(causal):
    from torch.nn.attention.flex_attention import flex_attention

    work = small(config=PSAConfig(causal=causal))
    inputs = make_inputs(work)
    binary = binary_levels(*chosen_levels(work, inputs), work)
    q, k, v = (torch.from_numpy(inputs[name]) for name in ("q", "k", "v"))
    mask = block_mask(binary, work, torch.device("cpu"))
    found = torch.compile(flex_attention)(q, k, v, block_mask=mask, enable_gqa=True)
    assert np.allclose(found.numpy(), oracle(inputs, binary, work, FLEX_BLOCK), atol=1e-5)


def test_chunked_dense_is_dense_attention_for_grouped_heads_and_any_length():
    import jax.numpy as jnp

    work = small(length=1100)
    inputs = make_inputs(work)
    found = chunked_dense(*(jnp.asarray(inputs[name]) for name in ("q", "k", "v")))
    dense = oracle(inputs, np.ones((1, 4, 9, 18), np.int32), work)
    assert np.allclose(found, dense, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_spot_checks_pass_the_oracle_and_catch_a_wrong_row(causal):
    work = small(config=PSAConfig(causal=causal))
    inputs = make_inputs(work)
    levels = chosen_levels(work, inputs)[1]
    out = oracle(inputs, levels, work)[:, spot_heads(work)]
    expected = expected_spots(inputs, levels, work.config.block_n, work)
    assert spot_error(out, expected) < 1e-9
    wrong = out.copy()
    wrong[:, -1, -1] *= 1.1
    assert spot_error(wrong, expected) > TOLERANCE["float32"]
    wrong[0, 0, 0, 0] = np.nan
    assert spot_error(wrong, expected) == float("inf")


# In a process of its own, as it is run: other tests put this one into Triton's interpreter.
RUN = """
import sys
from pathlib import Path
from benchmarks import runner
from tests.benchmarks.test_benchmarks import small
runner.run([small()], Path(sys.argv[1]), repeats=2)
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    output = tmp_path_factory.mktemp("bench") / "rows.jsonl"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run(
        [sys.executable, "-c", RUN, str(output)], cwd=ROOT, env=environment, check=True, timeout=280
    )
    return [json.loads(line) for line in output.read_text().splitlines()]


def row_of(rows, provider, which=FORWARD):
    return next(row for row in rows if (row["provider"], row["pass"]) == (provider, which))


@pytest.mark.parametrize("provider", ["torch-psa-gather", "jax-psa-gather"])
@pytest.mark.parametrize("which", [FORWARD, BACKWARD, BOTH])
def test_rows_carry_time_error_density_memory_and_machine(rows, provider, which):
    row = row_of(rows, provider, which)
    assert row["status"] == "ok" and row["kind"] == GIVEN
    assert 0 < row["ms_p20"] <= row["ms_median"] <= row["ms_p80"]
    assert row["error_oracle"] < 1e-5 and 0.01 < row["error_dense"] < 1
    assert 0 < row["density"] < 0.5 and row["flops"] > 0
    assert row["peak_bytes"] >= 0
    assert row["machine"]["cores"] >= 1 and row["machine"]["versions"]["numpy"] == np.__version__


def test_every_kind_is_timed_and_what_cannot_run_says_why(rows):
    done = {row["kind"] for row in rows if row["status"] == "ok"}
    assert done == {DENSE, GIVEN, WHOLE, PART}
    skipped = {row["provider"]: row["reason"] for row in rows if row["status"] == "skipped"}
    assert "CUDA" in skipped["torch-psa-triton"] and skipped["jax-psa-mosaic"]
    assert not [row for row in rows if row["status"] in ("wrong", "failed")]


def test_host_time_ends_when_the_call_returns():
    order = []
    times = host_seconds(lambda: order.append("call"), lambda _: order.append("wait"), 3)
    assert len(times) == 3 and min(times) > 0
    assert order == ["call", "wait"] * 4


def test_host_time_is_shown_where_it_was_taken(rows, tmp_path, capsys):
    assert row_of(rows, "torch-psa-gather")["host_ms"] is None
    stored = tmp_path / "rows.jsonl"
    stored.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "host ms" not in report.write([stored])
    stored.write_text("".join(json.dumps({**row, "host_ms": 0.625}) + "\n" for row in rows))
    assert (
        "host ms (forward) |" in report.write([stored]) and "| 0.625 |" in capsys.readouterr().out
    )


def test_flops_of_dense_and_sparse_have_the_ratio_of_the_density(rows):
    dense, sparse = row_of(rows, "torch-sdpa"), row_of(rows, "torch-psa-gather")
    assert sparse["flops"] / dense["flops"] == pytest.approx(sparse["density"], rel=0.1)


def test_a_wrong_provider_is_marked_wrong(tmp_path, monkeypatch):
    honest = TorchSession._given

    def broken(self, implementation):
        provider = honest(self, implementation)
        return dataclasses.replace(provider, output=lambda out: 1.01 * out)

    monkeypatch.setattr(TorchSession, "_given", broken)
    work = small(passes=(FORWARD,))
    done = runner.run(
        [work], tmp_path / "rows.jsonl", provider="gather", repeats=1, frameworks=("torch",)
    )
    assert row_of(done, "torch-psa-gather")["status"] == "wrong"
    assert row_of(done, "torch-sdpa")["status"] == "ok"


def test_without_a_dense_row_there_is_no_speed_up_and_no_error_against_it(tmp_path, capsys):
    work = small(config=PSAConfig(causal=True), passes=(FORWARD,))
    output = tmp_path / "rows.jsonl"
    done = runner.run([work], output, provider="gather", repeats=1, frameworks=("jax",))
    assert row_of(done, "jax-dense-chunked")["status"] == "skipped"
    row = row_of(done, "jax-psa-gather")
    assert row["status"] == "ok" and row["error_dense"] is None
    assert "| - |" in report.write([output])


def test_report_is_made_from_rows_alone_and_leaves_wrong_ones_out(rows, tmp_path, capsys):
    stored = tmp_path / "rows.jsonl"
    wrong = {**row_of(rows, "jax-psa-gather"), "status": "wrong", "reason": "error 1 against"}
    stored.write_text("".join(json.dumps(row) + "\n" for row in [*rows, wrong]))
    page = tmp_path / "benchmarks.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write([stored], page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert any(line.startswith("| torch-psa-gather (levels given)") for line in table)
    assert not any(line.startswith("| jax-psa-gather") for line in table)
    assert "jax-psa-gather (wrong: error 1 against)" in text
    assert "torch-psa-triton (skipped:" in text


def test_summary_is_one_row_a_machine_and_framework(rows, tmp_path, capsys):
    stored, readme = tmp_path / "rows.jsonl", tmp_path / "README.md"
    readme.write_text(f"before\n{report.SUMMARY_BEGIN}\nold\n{report.SUMMARY_END}\nafter\n")
    stored.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="whole call of one of cpu-8k"):
        report.summarise([stored], readme)
    renamed = [{**row, "workload": report.SUMMARY_WORKLOADS[0]} for row in rows]
    card = {"device": "A card", "driver": "1.2"}
    elsewhere = [{**row, "machine": {**row["machine"], **card}} for row in renamed]
    stored.write_text("".join(json.dumps(row) + "\n" for row in [*renamed, *elsewhere]))
    report.summarise([stored], readme)
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line[:1] == "|"][2:]
    assert [line[2] for line in lines] == ["`psa_torch`", "`psa_jax`"] * 2
    machine = renamed[0]["machine"]
    assert lines[0][0] == f"{machine['device']}, {machine['cores']} cores"
    assert lines[2][0] == "A card" and lines[0][-1] == "`torch-sdpa`"
    for cells, which in ((lines[0][3:5], FORWARD), (lines[0][5:7], BOTH)):
        dense, whole = row_of(rows, "torch-sdpa", which), row_of(rows, "torch-psa-whole", which)
        assert cells[0] == report._ms(whole["ms_median"])
        assert cells[1] == f"{dense['ms_median'] / whole['ms_median']:.2f}x"


def test_the_tables_of_the_repository_are_those_of_its_rows(tmp_path, capsys):
    stored = [ROOT / "benchmarks" / "results" / f"{name}.jsonl" for name in ("cpu", "h100", "h200")]
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert f"{report.BEGIN}\n{report.write(stored)}\n" in page
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    copy = tmp_path / "README.md"
    copy.write_text(readme, encoding="utf-8")
    report.summarise(stored, copy)
    assert copy.read_text(encoding="utf-8") == readme


def test_report_speed_up_is_dense_over_sparse(rows):
    dense, sparse = row_of(rows, "torch-sdpa"), row_of(rows, "torch-psa-gather")
    ratio = dense["ms_median"] / sparse["ms_median"]
    line = next(line for line in report._table("small", rows).splitlines() if "torch-psa-g" in line)
    assert f"{ratio:.2f}x" in line


def test_report_takes_the_demos_table_and_picture(tmp_path):
    folder, readme = tmp_path / "demo", tmp_path / "README.md"
    folder.mkdir()
    (folder / "demo.md").write_text("caption\n\n| a table |\n")
    (folder / "demo.png").write_bytes(b"picture")
    readme.write_text(f"before\n{report.DEMO_BEGIN}\nold\n{report.DEMO_END}\nafter\n")
    report.insert_demo(folder, readme)
    text = readme.read_text()
    assert "caption\n\n| a table |\n" in text and "old" not in text
    assert (tmp_path / report.DEMO_FIGURE).read_bytes() == b"picture"
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="must hold the lines"):
        report.insert_demo(folder, readme)


def test_report_refuses_lines_that_are_no_rows(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"workload": "w"}\n')
    with pytest.raises(ValueError, match="rows.jsonl:1 is not a benchmark row"):
        report.load([tmp_path / "rows.jsonl"])
