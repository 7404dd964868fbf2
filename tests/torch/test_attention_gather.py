"""The `gather` implementation: the contract, its own promises, and recorded cases."""

import importlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from psa_torch import pyramid, sparse_attention
from psa_torch.attention import gather
from psa_torch.attention.gather import buffers, plan
from shared_specs.flops import visited_tokens
from tests.torch.attention_contract import (
    AttentionContract,
    Case,
    assert_close,
    expected,
    run,
)

# The package's own attribute of this name is the function.
forward = importlib.import_module("psa_torch.attention.gather.forward")

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
RECORDED = {c["name"]: c for c in json.loads((GOLDEN / "index.json").read_text())["cases"]}


@pytest.fixture
def poisoned():
    """Every uninitialised tensor holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1000).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.usefixtures("poisoned")
class TestGather(AttentionContract):
    implementation = "gather"


@pytest.mark.usefixtures("poisoned")
class TestGatherInManyBatches(AttentionContract):
    """The same with limits so low that every problem takes many slabs and batches, head by head."""

    implementation = "gather"

    @pytest.fixture(autouse=True)
    def low_limits(self, monkeypatch):
        monkeypatch.setattr(plan, "SLAB_RUNS", 100)
        monkeypatch.setattr(plan, "BATCH_LOGITS", 20_000)
        monkeypatch.setattr(forward, "CACHED_ROWS", 1)


@pytest.mark.parametrize("head_dim", [8, 40, 72, 256])
def test_head_dimensions(head_dim, rng):
    case = Case(head_dim=head_dim, is_causal=True)
    inputs = case.inputs(rng)
    assert_close(
        run(inputs, "gather", **case.settings()), expected(inputs, **case.settings()), 2e-6
    )


@pytest.mark.parametrize("is_causal", [False, True])
def test_float64_is_computed_in_float64(is_causal, rng):
    case = Case(dtype=torch.float64, is_causal=is_causal, level="empty", block_n=32)
    inputs = case.inputs(rng)
    got, want = run(inputs, "gather", **case.settings()), expected(inputs, **case.settings())
    assert_close(got, want, 1e-14)


def test_unselected_keys_are_never_read(rng):
    case = Case(kv_len=500, level="empty")
    inputs = case.inputs(rng)
    levels = inputs.levels.clone()
    levels[..., 2:5] = 0
    clean = inputs._replace(levels=levels)
    poison = [x.clone() for x in (inputs.k, inputs.v)]
    for x in poison:
        x[:, :, 2 * case.block_n : 5 * case.block_n] = torch.nan
    got = run(clean._replace(k=poison[0], v=poison[1]), "gather", **case.settings())
    for x, y in zip(got, run(clean, "gather", **case.settings()), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("logit", [0.1, 20, 31, 200, 5000])
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("is_causal", [False, True])
def test_logits_of_any_size(logit, sign, is_causal, rng):
    """Every logit near the one given, in base 2, above or below 0."""
    case = Case(kv_len=300, level="empty", is_causal=is_causal, scale=1.0)
    inputs = case.inputs(rng)
    one = torch.ones(()) / case.head_dim**0.5
    q = (one + inputs.q / 100) * sign * logit / math.log2(math.e)
    inputs = inputs._replace(q=q, k=one + inputs.k / 100)
    got, want = run(inputs, "gather", **case.settings()), expected(inputs, **case.settings())
    rounding = 1e-6 * max(logit, 4)
    assert_close(got, want, rounding)


@pytest.mark.parametrize("is_causal", [False, True])
def test_rows_multiplied_are_the_visited_rows(is_causal, rng):
    """Padding to batches of equal size costs little, however much the counts vary."""
    case = Case(q_len=1500, kv_len=3000, batch=1, heads=4, is_causal=is_causal)
    inputs = case.inputs(rng)
    keep = torch.from_numpy(rng.random(inputs.levels.shape) < rng.random((1, 4, 24, 1)))
    levels = (inputs.levels * keep).int()
    settings = {**case.settings(), "scale": 1.0}
    problem = plan.Problem.of(inputs.q, inputs.k, **settings)
    multiplied = sum(batch.runs.numel() for batch in plan.batches(problem, levels))
    visited = int(visited_tokens(levels.numpy(), case.kv_len, case.block_n).sum())
    multiplied *= problem.run_rows
    if is_causal:
        assert multiplied < 0.95 * visited  # blocks past the diagonal are left out
    else:
        assert visited <= multiplied < 1.1 * visited


def test_memory_is_bounded_by_the_batch(rng, monkeypatch):
    case = Case(q_len=2048, kv_len=2048, batch=1, heads=8, kv_heads=8, level=4)
    inputs = case.inputs(rng)
    taken = []
    take = buffers.Buffers.take

    def record(self, name, *shape):
        taken.append(torch.Size(shape).numel())
        return take(self, name, *shape)

    monkeypatch.setattr(buffers.Buffers, "take", record)
    run(inputs, "gather", **case.settings())
    assert 8 * 2048 * 2048 / 4 > 4 * plan.BATCH_LOGITS
    assert max(taken) <= plan.BATCH_LOGITS


@pytest.mark.parametrize("name", [n for n, c in RECORDED.items() if c["kind"] == "forward"])
def test_recorded_forward(name):
    data, settings = _recorded(name)
    out = gather.forward(*_tensors(data, "q", "k", "v", "levels"), **settings)[0]
    rows = _comparable_rows(name, data, settings["block_m"])
    np.testing.assert_allclose(out.numpy()[rows], data["out"][rows], rtol=0, atol=1e-6)
    if "mask_newtype" in data:
        again = sparse_attention(*_tensors(data, "q", "k", "v", "mask_newtype"), **settings)
        torch.testing.assert_close(again, out, rtol=0, atol=0)


def test_recorded_backward():
    data, settings = _recorded("bwd_legacy_200")
    q, k, v, levels, dout = _tensors(data, "q", "k", "v", "levels", "do")
    out, lse = gather.forward(q, k, v, levels, **settings)
    dq = gather.backward(dout, None, q, k, v, levels, out, lse, **settings)[0]
    rows = _comparable_rows("bwd_legacy_200", data, settings["block_m"])
    assert rows.any()
    np.testing.assert_allclose(dq.numpy()[rows], data["dq"][rows], rtol=0, atol=2e-6)


def _recorded(name):
    config = RECORDED[name]["config"]
    settings = {n: config[n] for n in ("block_m", "block_n")}
    settings |= {"scale": config["sm_scale"], "is_causal": config["causal"]}
    return np.load(GOLDEN / RECORDED[name]["file"]), settings


def _tensors(data, *names):
    return [torch.from_numpy(data[name]) for name in names]


def _comparable_rows(name, data, block_m):
    """The original counts the padding of a ragged block as keys at pooled levels."""
    rows = np.ones(data["q"].shape[:3], bool)
    if name in ("fwd_legacy_tail300", "bwd_legacy_200"):
        rows &= np.repeat(data["levels"][..., -1] <= 1, block_m, axis=2)[:, :, : rows.shape[2]]
    return rows


class TestBrokenVariantsAreCaught:
    """The comparison that passes above must fail for each of these mistakes."""

    case = Case(kv_len=203, is_causal=True)

    def caught(self, rng) -> bool:
        inputs = self.case.inputs(rng)
        want = expected(inputs, **self.case.settings())
        got = run(inputs, "gather", **self.case.settings())
        try:
            assert_close(got, want, 100 * AttentionContract.tolerance)
        except AssertionError:
            return True
        return False

    def break_columns(self, monkeypatch, change):
        of = plan.Columns.of
        monkeypatch.setattr(plan.Columns, "of", lambda p: change(of(p)))

    def test_nothing_is_caught_when_nothing_is_broken(self, rng):
        assert not self.caught(rng)

    def test_missing_log_bias(self, rng, monkeypatch):
        self.break_columns(monkeypatch, lambda c: c._replace(bias=c.bias.clamp(max=0)))
        assert self.caught(rng)

    def test_tail_counted_as_full(self, rng, monkeypatch):
        def full(c):
            # 203 keys end in a group of 3 at levels 4 and 8.
            bias = c.bias.masked_fill(c.bias == np.log2(3), 2.0)
            return c._replace(bias=bias)

        self.break_columns(monkeypatch, full)
        assert self.caught(rng)

    def test_tail_attended_past_the_end(self, rng, monkeypatch):
        self.break_columns(monkeypatch, lambda c: c._replace(bias=c.bias.clamp(min=0)))
        assert self.caught(rng)

    @pytest.mark.parametrize("off", [-1, 1])
    def test_causal_off_by_one(self, off, rng, monkeypatch):
        self.break_columns(monkeypatch, lambda c: c._replace(last_key=c.last_key + off))
        assert self.caught(rng)

    def test_gradient_without_the_pooling_mean(self, rng, monkeypatch):
        def summed(*args):
            with monkeypatch.context() as patch:
                patch.setattr(pyramid, "_counts", lambda length, groups, *rest: torch.ones(groups))
                return pyramid.unpool(*args)

        module = importlib.import_module("psa_torch.attention.gather.backward")
        monkeypatch.setattr(module, "unpool", summed)
        assert self.caught(rng)


def test_other_head_dimensions_are_refused_with_the_reason(rng):
    q, k, v, *_ = Case(head_dim=12).inputs(rng)
    assert "multiple of 8" in gather.unsupported(q, k, v, 64, 64)
    assert "block_m" in gather.unsupported(q[..., :8], k[..., :8], v[..., :8], 32, 64)
    assert "int32" in gather.unsupported(q.int(), k.int(), v.int(), 64, 64)
    assert gather.unsupported(q[..., :8], k[..., :8], v[..., :8], 64, 64) is None
