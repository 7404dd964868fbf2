"""The warp-specialised forward, run as threads: same answers, no deadlock, no early release."""

import dataclasses
import functools
import math
from unittest import mock

import pytest
import torch

from psa_torch.attention.triton import forward_pass, hopper, rows
from psa_torch.attention.triton.configs import HopperForwardConfig
from psa_torch.attention.triton.forward_pass import forward
from psa_torch.attention.triton.rows import rows_in_place
from psa_torch.pyramid import Pyramid, build_pyramid, pool_levels
from tests.support import gluon_interpreter
from tests.support.memory_layouts import rows_copied, rows_in_one_place
from tests.torch.attention_contract import Case, expected, to_numpy
from tests.torch.past_float32 import assert_rule, ordinary, past_range

forward_hopper = pytest.importorskip("psa_torch.attention.triton.hopper.forward")

BASE = Case(batch=1, kv_heads=1, block_m=128, head_dim=64, q_len=200, kv_len=700)
CASES = [
    BASE,
    dataclasses.replace(BASE, block_n=32, heads=1),
    dataclasses.replace(BASE, block_n=128, is_causal=True, scale=-0.3),
    dataclasses.replace(BASE, q_len=300, kv_len=150, is_causal=True),
    dataclasses.replace(BASE, heads=1, q_len=1, kv_len=1, level=8),
    dataclasses.replace(BASE, level="empty"),
    dataclasses.replace(BASE, heads=1, head_dim=40, block_n=128),
    dataclasses.replace(BASE, head_dim=72, is_causal=True),
    dataclasses.replace(BASE, heads=1, kv_len=1500, level=1),
]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    kernel = gluon_interpreter.Interpreted(forward_hopper.attention_forward_hopper)
    monkeypatch.setattr(forward_hopper, "attention_forward_hopper", kernel)
    monkeypatch.setattr(hopper, "DTYPES", (torch.float32,))
    monkeypatch.setattr(forward_pass, "rows_in_place", rows_in_one_place)


CONFIGS = [HopperForwardConfig(tile=64, stages=2), HopperForwardConfig(tile=128, stages=3)]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_oracle(case, config, rng):
    inputs = case.inputs(rng)
    settings = case.kernel_settings()
    out, lse = forward(*inputs[:4], config=config, **settings)
    want = expected(inputs, **settings)
    torch.testing.assert_close(out.double(), torch.from_numpy(want.out), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(lse.double(), torch.from_numpy(want.lse), rtol=1e-6, atol=2e-6)
    assert not to_numpy(out)[torch.isneginf(lse).numpy()].any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_past_the_range_of_float32(rng):
    case = dataclasses.replace(BASE, heads=1, level=1)
    inputs = past_range(case, rng)
    settings = case.kernel_settings()
    out, lse = forward(*inputs[:4], config=CONFIGS[1], **settings)
    assert_rule(out, lse)
    want = expected(inputs, **settings)
    torch.testing.assert_close(
        ordinary(out), ordinary(torch.from_numpy(want.out)), rtol=1e-5, atol=2e-6
    )


@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_level_1_copied_is_level_1_in_place(case, rng, monkeypatch):
    inputs = case.inputs(rng)
    config = HopperForwardConfig(tile=64, stages=2)
    settings = {**case.settings(), "scale": 0.125, "config": config}
    in_place = forward(*inputs[:4], **settings)
    monkeypatch.setattr(forward_pass, "rows_in_place", rows_copied)
    for x, y in zip(in_place, forward(*inputs[:4], **settings), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("padding", [16, 8], ids=["copied from there", "made contiguous"])
def test_strided_queries(padding, rng):
    """Heads inside rows, in memory that is NaN between them."""
    case = dataclasses.replace(BASE, batch=2, q_len=500, is_causal=True)
    inputs, settings = case.inputs(rng), {**case.settings(), "scale": 0.125}
    config = HopperForwardConfig(tile=64, stages=2)
    want = forward(*inputs[:4], config=config, **settings)
    wide = torch.full((2, 500, inputs.q.shape[1], 64 + padding), torch.nan)
    q = wide[..., :64].transpose(1, 2)
    q.copy_(inputs.q)
    for x, y in zip(forward(q, *inputs[1:4], config=config, **settings), want, strict=True):
        assert torch.equal(x, y)


class TestRows:
    """Whether level 1 can be read where it lies."""

    def test_of_contiguous_tensors_that_lie_whole_rows_apart(self):
        # A page holds whole rows, and so do all pages between two of them.
        k, v = (_page_aligned(1, 2, 700, 64) for _ in range(2))
        with mock.patch.object(rows, "pool_levels", _pooled_on_pages):
            found = rows_in_place(k, v, 64)
        assert found.k is k and found.v is v and found.skipped == 704
        key_rows, pooled_rows, skipped, *apart = found.places()
        assert (key_rows, pooled_rows, skipped) == (700, 704 - 704 // 8, 704)
        for x, pooled, distance in zip(
            (k, v), (found.pooled_k, found.pooled_v), apart, strict=True
        ):
            assert x.data_ptr() + distance * 64 * x.element_size() == pooled.data_ptr()

    @pytest.mark.parametrize("spoil", ["strided", "misaligned", "part of a row", "far"])
    def test_else_all_levels_are_copied(self, spoil, monkeypatch):
        k, v = (_page_aligned(1, 2, 700, 64) for _ in range(2))
        pool = _pooled_on_pages
        if spoil == "strided":
            v = v.transpose(1, 2).contiguous().transpose(1, 2)
        elif spoil == "misaligned":
            v = _page_aligned(1, 2, 700, 64, offset=1)
        elif spoil == "part of a row":
            pool = functools.partial(_pooled_on_pages, offset=8)
        else:
            monkeypatch.setattr(rows, "FARTHEST", 1)
        monkeypatch.setattr(rows, "pool_levels", pool)
        found = rows_in_place(k, v, 64)
        want = build_pyramid(k, v, 64)
        assert torch.equal(found.k, want.k) and torch.equal(found.v, want.v)
        assert found.pooled_k is found.k and found.pooled_v is found.v
        assert found.places() == (want.k.shape[2], want.k.shape[2], 0, 0, 0)


def _page_aligned(*shape, offset=0):
    """Random numbers that begin `offset` elements after an address divisible by 4,096."""
    size = math.prod(shape)
    memory = torch.empty(size + 2048)
    first = -memory.data_ptr() % 4096 // memory.element_size() + offset
    return memory[first : first + size].view(shape).normal_()


def _pooled_on_pages(k, v, block_n, offset=0):
    pooled = pool_levels(k, v, block_n)
    return Pyramid(*(_page_aligned(*x.shape, offset=offset).copy_(x) for x in pooled))


BARRIERS = ["q_full", "q_empty", "k_full", "k_empty", "v_full", "v_empty"]


@pytest.mark.parametrize("deaf", BARRIERS)
def test_a_missing_wait_is_noticed(deaf, rng):
    """Without one of its waits the kernel gives a wrong answer or never ends."""
    # Several query blocks a program; with one tile each, copies run ahead by whole blocks.
    sizes = dict(q_len=1500, kv_len=60) if deaf == "q_empty" else dict(kv_len=2000)
    case = dataclasses.replace(BASE, heads=1, level=1, **sizes)
    inputs = case.inputs(rng)
    settings = {**case.settings(), "scale": 0.125}
    want, _ = forward(*inputs[:4], **settings)
    with (
        pytest.raises((AssertionError, TimeoutError)),
        gluon_interpreter.deaf_barrier(BARRIERS.index(deaf), of_copies=deaf.endswith("full")),
    ):
        out, _ = forward(*inputs[:4], config=CONFIGS[0], **settings)
        torch.testing.assert_close(out, want)
