"""The warp-specialised dq, run as threads: same answers, no deadlock, no early release."""

import dataclasses
from unittest import mock

import pytest
import torch
from torch import Tensor

from psa_torch.attention.triton import hopper
from psa_torch.attention.triton.configs import HopperQueryGradConfig
from psa_torch.attention.triton.plan import query_plan
from psa_torch.attention.triton.query_gradient import launch_query_gradient
from psa_torch.attention.triton.row_statistics import RowStatistics
from shared_specs.geometry import Geometry
from tests.support import gluon_interpreter
from tests.support.memory_layouts import rows_copied, rows_in_one_place, strided
from tests.torch.attention_contract import FLOAT32_TOLERANCE, Case, Results, expected

kernels = pytest.importorskip("psa_torch.attention.triton.hopper.query_gradient")

BASE = Case(batch=1, heads=2, kv_heads=1, block_m=128, head_dim=64, q_len=200, kv_len=700)
CASES = [
    BASE,
    dataclasses.replace(BASE, block_n=32, heads=1),
    dataclasses.replace(BASE, block_n=128, is_causal=True, scale=-0.3),
    dataclasses.replace(BASE, q_len=300, kv_len=150, is_causal=True),
    dataclasses.replace(BASE, batch=2, heads=4, kv_heads=2, head_dim=128, is_causal=True),
    dataclasses.replace(BASE, heads=1, q_len=1, kv_len=1, level=8),
    dataclasses.replace(BASE, level="empty", batch=2),
    dataclasses.replace(BASE, level="empty", is_causal=True, block_n=32),
    dataclasses.replace(BASE, heads=1, kv_len=1500, level=1),
    dataclasses.replace(BASE, heads=1, kv_len=1536, q_len=128, level=1),
    dataclasses.replace(BASE, heads=1, kv_len=2050, level=8),
    dataclasses.replace(BASE, heads=1, head_dim=72, is_causal=True),
]
CONFIGS = [
    HopperQueryGradConfig(tile=64, stages=1),
    HopperQueryGradConfig(tile=64, stages=2, beside=True),
    HopperQueryGradConfig(tile=64, stages=4, beside=True),
    HopperQueryGradConfig(tile=128, stages=2),
]


@pytest.fixture(autouse=True)
def interpreted(poisoned_memory):
    kernel = gluon_interpreter.Interpreted(kernels.query_gradient_hopper)
    with (
        mock.patch.object(kernels, "query_gradient_hopper", kernel),
        mock.patch.object(hopper, "DTYPES", (torch.float32,)),
    ):
        yield


def query_gradient(
    inputs, want, config, *, block_m, block_n, scale, is_causal, rows=rows_in_one_place
) -> Tensor:
    """dq by the kernel under test; lse and out are the oracle's `want`."""
    q, k, v, levels, dout, dlse = inputs
    lse, out = torch.from_numpy(want.lse), torch.from_numpy(want.out)
    unseen = torch.isneginf(lse)
    padded_len = -(-q.shape[2] // block_m) * block_m

    # As `row_statistics` leaves them: rows without keys, or past the end, weigh nothing.
    def padded(x, nothing):
        x = x.masked_fill(unseen, nothing)
        return torch.nn.functional.pad(x, (0, padded_len - x.shape[-1]), value=nothing).float()

    delta = padded((dout.double() * out).sum(-1) - dlse.double(), 0.0)
    lse2 = padded(lse * 1.4426950408889634, torch.inf)
    geometry = Geometry(q.shape[2], k.shape[2], block_m, block_n, is_causal)
    return launch_query_gradient(
        q,
        rows(k, v, block_n),
        dout,
        RowStatistics(delta, lse2),
        query_plan(levels, geometry),
        geometry,
        scale=scale,
        config=config,
    )


def check(got: Tensor, want: Results, dout: Tensor) -> None:
    """As the contract does: a small error by norm, and exactly 0 where a row sees nothing."""
    assert not got[torch.isneginf(torch.from_numpy(want.lse))].any()
    right = torch.from_numpy(want.dq)
    # The second part is for rows of one key, where dp and delta cancel all but dlse.
    allowed = FLOAT32_TOLERANCE * torch.linalg.norm(right) + 1e-7 * torch.linalg.norm(dout)
    assert torch.linalg.norm(got - right) <= allowed


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_oracle(case, config, rng):
    inputs, settings = case.inputs(rng), case.kernel_settings()
    want = expected(inputs, **settings)
    got = query_gradient(inputs, want, config, **settings)
    check(got, want, inputs.dout)


def test_strided_queries_and_gradients(rng):
    case = dataclasses.replace(BASE, batch=2, is_causal=True)
    inputs, settings = case.inputs(rng), case.kernel_settings()
    want = expected(inputs, **settings)
    views = inputs._replace(q=strided(inputs.q), dout=strided(inputs.dout))
    got = query_gradient(views, want, CONFIGS[0], **settings)
    torch.testing.assert_close(got, query_gradient(inputs, want, CONFIGS[0], **settings))


@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_level_1_copied_is_level_1_in_place(case, rng):
    inputs, settings = case.inputs(rng), case.kernel_settings()
    want = expected(inputs, **settings)
    in_place = query_gradient(inputs, want, CONFIGS[0], **settings)
    copied = query_gradient(inputs, want, CONFIGS[0], **settings, rows=rows_copied)
    assert torch.equal(in_place, copied)


@pytest.mark.parametrize("config", CONFIGS[1::2], ids=str)
@pytest.mark.parametrize("deaf", ["k_full", "v_full", "empty"])
def test_a_missing_wait_is_noticed(deaf, config, rng):
    """Without one of its waits the kernel gives a wrong answer or never ends."""
    case = dataclasses.replace(BASE, heads=1, q_len=128, kv_len=2000, level=1)
    inputs, settings = case.inputs(rng), case.kernel_settings()
    want = expected(inputs, **settings)
    place = ["k_full", "v_full", "empty"].index(deaf)
    with (
        pytest.raises((AssertionError, TimeoutError)),
        gluon_interpreter.deaf_barrier(place, of_copies=deaf.endswith("full")),
    ):
        got = query_gradient(inputs, want, config, **settings)
        check(got, want, inputs.dout)


def test_what_the_kernel_cannot_do_is_refused(rng):
    with pytest.raises(ValueError, match="stages must be at least 2"):
        HopperQueryGradConfig(tile=64, stages=1, beside=True)
    case = dataclasses.replace(BASE, head_dim=32)
    inputs, settings = case.inputs(rng), case.kernel_settings()
    with pytest.raises(ValueError, match="head dimension"):
        query_gradient(inputs, expected(inputs, **settings), CONFIGS[0], **settings)
