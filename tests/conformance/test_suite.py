"""The suite itself: its data, its loader, and that it can fail."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared_specs.conformance import load_adapter, load_suite, pytest_cases, report, run_suite
from shared_specs.conformance.flags import FLAGS
from shared_specs.conformance.generate import differences
from shared_specs.conformance.mutants import MUTANTS
from shared_specs.conformance.reference import NumpyAdapter
from shared_specs.conformance.runner import FAILED, PASSED, SKIPPED
from shared_specs.conformance.suite import DATA

SUITE = load_suite()


def test_the_suite_is_as_large_as_it_claims():
    assert len(SUITE) >= 120
    assert {case.tier for case in SUITE} == {"select", "table", "forward", "backward", "order"}
    caught = {flag for case in SUITE for flag in case.flags}
    assert caught == set(FLAGS) == set(MUTANTS)
    assert sum(path.stat().st_size for path in DATA.parent.glob("v*/*")) < 8e6


def test_a_version_contains_those_before_it():
    first = [case.id for case in load_suite(DATA.parent / "v1")]
    assert [case.id for case in SUITE[: len(first)]] == first and len(SUITE) > len(first)


def test_an_adapter_that_knows_no_lengths_is_not_asked_for_them():
    class Older(NumpyAdapter):
        def forward(self, q, k, v, levels, *, block_m, block_n, scale, is_causal, dtype):
            raise AssertionError

    cases = [case for case in SUITE if case.id == "forward-lengths"]
    (result,) = run_suite(Older(), cases, ["float32"])
    assert result.status == SKIPPED and "adapter has no q_lens" in result.message


def test_regenerating_gives_the_same_bytes():
    assert differences() == []


def test_the_reference_passes_everything():
    results = run_suite(NumpyAdapter(), SUITE, ["float64"])
    assert {result.status for result in results} == {PASSED}


@pytest.mark.parametrize("flag", FLAGS)
def test_a_mutant_fails_exactly_the_cases_whose_flags_name_it(flag):
    results = run_suite(MUTANTS[flag], SUITE, ["float64"])
    failed = {result.case for result in results if result.status == FAILED}
    assert failed == {case.id for case in SUITE if flag in case.flags}
    assert failed


def test_inputs_are_exact_in_half_precisions():
    for case in SUITE:
        if case.tier not in ("forward", "backward"):
            continue
        arrays = case.arrays()
        for name in ("q", "k", "v", "dout", "dlse"):
            if name in arrays:
                x = arrays[name]
                assert (np.abs(x) <= 4).all() and (x * 64 == np.round(x * 64)).all()
                np.testing.assert_array_equal(x.astype(np.float16).astype(np.float32), x)
                bits = x.view(np.uint32)
                assert (bits & 0xFFFF == 0).all()  # what bfloat16 drops of a float32


def test_what_an_adapter_lacks_is_skipped_with_the_reason():
    class Binary(NumpyAdapter):
        table = property(lambda self: None)

        def capabilities(self):
            return {"levels": {0, 1}, "dtype": {"float32"}, "is_causal": {False}}

        def order(self, method, grid, tile):
            raise NotImplementedError("no token orders here")

    results = {(r.case, r.dtype): r for r in run_suite(Binary(), SUITE)}
    assert results["order-gilbert-4x4x4", "exact"].message == "no token orders here"
    assert "levels 2" in results["forward-blocks-64x32", "float32"].message
    assert "needs dtype float16" in results["forward-binary", "float16"].message
    assert "needs is_causal True" in results["forward-binary-causal", "float32"].message
    assert results["forward-binary", "float32"].status == PASSED
    skipped = [r for r in results.values() if r.status == SKIPPED]
    assert all(r.message for r in skipped)


def test_an_exception_of_the_adapter_is_a_failure():
    class Broken(NumpyAdapter):
        def forward(self, *args, **kwargs):
            raise RuntimeError("out of registers")

    (result,) = run_suite(Broken(), [c for c in SUITE if c.id == "forward-binary"], ["float32"])
    assert result.status == FAILED and "out of registers" in result.message


@pytest.mark.parametrize("wrong", ["nan", "shape", "minus_inf"])
def test_answers_that_cannot_be_compared_fail(wrong):
    class Wrong(NumpyAdapter):
        def forward(self, *args, **kwargs):
            out, lse = super().forward(*args, **kwargs)
            if wrong == "nan":
                out[0, 0, 0, 0] = np.nan
            elif wrong == "shape":
                out = out[..., :-1]
            else:
                lse = np.where(np.isneginf(lse), -1e30, lse)
            return out, lse

    case = [c for c in SUITE if c.id == "forward-empty-rows"]
    (result,) = run_suite(Wrong(), case, ["float64"])
    assert result.status == FAILED


def test_reports_name_the_mistake(tmp_path):
    mutant = MUTANTS["no_log_bias"]
    results = run_suite(mutant, SUITE, ["float64"])
    text = report.as_text("mine", SUITE, results)
    assert text.split("likeliest first:")[1].split("\n") == ["", "  " + FLAGS["no_log_bias"]]
    parsed = json.loads(report.as_json("mine", SUITE, results))
    assert parsed["summary"]["failed"] == sum(r.status == FAILED for r in results)
    page = report.as_html("mine", SUITE, results)
    assert "<svg" in page and "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert FLAGS["no_log_bias"] in page


def test_pytest_lists_must_name_cases():
    with pytest.raises(ValueError, match="no-such-case"):
        pytest_cases(NumpyAdapter(), skip=["no-such-case"])


# The three lines of the documentation:
test_from_pytest = pytest_cases(
    "shared_specs.conformance.reference", tiers=["order", "table"], skip=["table-empty"]
)


@pytest.mark.parametrize(
    "target, error",
    [
        ("no_such_module_anywhere", ImportError),
        ("shared_specs.conformance.reference:nothing", ValueError),
        ("json:dumps", ValueError),
        (":adapter", ValueError),
    ],
)
def test_adapters_that_cannot_be_loaded(target, error):
    with pytest.raises(error):
        load_adapter(target)


def _copy(folder: Path) -> Path:
    (folder / "suite").mkdir()
    index = json.loads((DATA / "index.json").read_text())
    index |= {"cases": index["cases"][:1], "contains": []}
    shutil.copy(DATA / index["cases"][0]["file"], folder / "suite")
    (folder / "suite" / "index.json").write_text(json.dumps(index))
    return folder / "suite"


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2},
        {"cases": 3},
        {"cases": [{"id": "x"}]},
        {"cases": ["x"]},
        {"contains": "v1"},
        {"contains": [1]},
        {"contains": ["../v1"]},
        {"contains": ["suite"]},
    ],
)
def test_malformed_indexes_are_refused(tmp_path, change):
    folder = _copy(tmp_path)
    index = json.loads((folder / "index.json").read_text()) | change
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError):
        load_suite(folder)


@pytest.mark.parametrize(
    "field, value",
    [
        ("file", "../../secrets.npz"),
        ("file", "/etc/passwd"),
        ("tier", "sideways"),
        ("flags", ["no such mistake"]),
        ("requires", {"levels": 3}),
        ("tolerance", {"float32": 1.0}),
        ("id", 4),
    ],
)
def test_malformed_cases_are_refused(tmp_path, field, value):
    folder = _copy(tmp_path)
    index = json.loads((folder / "index.json").read_text())
    index["cases"][0][field] = value
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError):
        load_suite(folder)


def test_changed_bytes_are_refused(tmp_path):
    folder = _copy(tmp_path)
    (case,) = load_suite(folder)
    data = bytearray((folder / case.file).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / case.file).write_bytes(data)
    with pytest.raises(ValueError, match="sha256"):
        case.arrays()


def test_pickled_arrays_are_never_executed(tmp_path):
    import dataclasses
    import hashlib

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    file = io.BytesIO()
    np.savez(file, levels=np.array([Bomb()], dtype=object))
    (tmp_path / "x.npz").write_bytes(file.getvalue())
    digest = hashlib.sha256(file.getvalue()).hexdigest()
    case = dataclasses.replace(SUITE[0], file="x.npz", sha256=digest, folder=tmp_path)
    with pytest.raises(ValueError, match=r"not a plain \.npz"):
        case.arrays()
    assert not (tmp_path / "executed").exists()


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.binary(max_size=300))
def test_random_bytes_as_an_index(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "index.json").write_bytes(data)
    with pytest.raises(ValueError):
        load_suite(folder)
