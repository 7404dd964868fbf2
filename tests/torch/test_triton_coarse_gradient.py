"""dk and dv of pooled levels by query blocks: any rounds, and no slot read that was not written."""

import dataclasses

import numpy as np
import pytest
import torch

from psa_torch.attention.triton import configs
from psa_torch.attention.triton.backward_pass import backward, backward_planned
from psa_torch.attention.triton.configs import BackwardConfig, CoarseGradConfig, KeyGradConfig
from psa_torch.attention.triton.forward_pass import forward
from psa_torch.attention.triton.plan import key_plan, query_plan
from psa_torch.attention.triton.rows import rows_of_pyramid
from psa_torch.pyramid import build_pyramid
from shared_specs.geometry import Geometry
from tests.torch.attention_contract import (
    FLOAT32_TOLERANCE,
    Case,
    Results,
    expected,
    plain_attention,
    relative_errors,
    to_numpy,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

ONE_BLOCK_ROUNDS = 1
"""Bytes of workspace in which no slot fits."""


def all_coarse(case: Case, workspace=2**30, tile=32, rows=None) -> BackwardConfig:
    """Every level but the first by query blocks."""
    key = ((9, 0), case.head_dim, case.dtype, case.block_m, case.block_n)
    shipped = configs.choose_plain_backward(*key)
    pooled = CoarseGradConfig(
        tile=tile, rows=rows or case.block_m, warps=4, stages=2, workspace=workspace
    )
    key = KeyGradConfig(keys=32, rows=64, warps=4, stages=2)
    return dataclasses.replace(shipped, key=(key, pooled, pooled, pooled))


def gradients(case: Case, inputs, config: BackwardConfig) -> Results:
    q, k, v, levels, dout, dlse = inputs
    out, lse = forward(q, k, v, levels, **case.kernel_settings())
    grads = backward(dout, dlse, q, k, v, levels, out, lse, config=config, **case.kernel_settings())
    return Results(*(to_numpy(x) for x in (out, lse, *grads)))


def check(case: Case, rng, **config) -> None:
    inputs = case.inputs(rng)
    got = gradients(case, inputs, all_coarse(case, **config))
    errors = relative_errors(got, expected(inputs, **case.kernel_settings()))
    assert max(errors.values()) <= FLOAT32_TOLERANCE, errors


ONE = Case(batch=1, heads=1, kv_heads=1)


@pytest.mark.parametrize("block_n", [32, 64, 128])
@pytest.mark.parametrize(("block_m", "workspace"), [(64, ONE_BLOCK_ROUNDS), (128, 2**30)])
def test_block_sizes_in_one_round_or_many(block_m, block_n, workspace, rng):
    case = dataclasses.replace(ONE, block_m=block_m, block_n=block_n, q_len=300, kv_len=333)
    check(case, rng, workspace=workspace)


@pytest.mark.parametrize("level", [2, 4, 8])
@pytest.mark.parametrize("kv_len", [193, 199])
def test_one_level_alone_with_every_tail(level, kv_len, rng):
    check(dataclasses.replace(ONE, level=level, kv_len=kv_len), rng)


@pytest.mark.parametrize(("q_len", "kv_len"), [(256, 256), (77, 300), (300, 77), (200, 201)])
def test_causal_with_offset(q_len, kv_len, rng):
    """Blocks that causality hides are not written, whatever their level says."""
    lengths = dict(q_len=q_len, kv_len=kv_len)
    case = dataclasses.replace(ONE, is_causal=True, block_n=32, **lengths)
    check(case, rng, workspace=2 * 300 * 32 * 4)


@pytest.mark.parametrize("is_causal", [False, True])
def test_grouped_heads_batches_and_empty_rows(is_causal, rng):
    case = Case(kv_heads=1, q_len=130, kv_len=130, level="empty", is_causal=is_causal)
    check(case, rng, workspace=ONE_BLOCK_ROUNDS)


@pytest.mark.parametrize(("tile", "rows"), [(16, 64), (64, 32), (128, 16)])
def test_tile_sizes_do_not_change_the_answer(tile, rows, rng):
    check(dataclasses.replace(ONE, kv_len=700), rng, tile=tile, rows=rows)


def test_lists_longer_than_one_look(rng, monkeypatch):
    monkeypatch.setattr("psa_torch.attention.triton.coarse_gradient.LIST_WIDTH", 2)
    case = dataclasses.replace(ONE, level=8, q_len=600, kv_len=70)
    check(case, rng, workspace=3 * 2 * 16 * 32 * 4)


@pytest.mark.parametrize("scale", [0.0, -0.4, 40.0])
def test_any_scale(scale, rng):
    case = dataclasses.replace(ONE, scale=scale, level=8)
    inputs = case.inputs(rng)
    errors = relative_errors(
        gradients(case, inputs, all_coarse(case)), expected(inputs, **case.kernel_settings())
    )
    # Rounding of logits near 1000 is what float32 leaves of the largest scale.
    assert max(errors.values()) <= (2e-3 if scale > 1 else FLOAT32_TOLERANCE), errors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounded_slots_are_within_twice_the_plain_error(dtype, rng):
    """Sums over many query blocks, each rounded to the dtype of the input."""
    case = dataclasses.replace(ONE, dtype=dtype, q_len=1000, kv_len=256)
    inputs = case.inputs(rng)
    inputs.levels[..., 0] = 1  # the yardstick has no rule for rows that see nothing
    want = expected(inputs, **case.kernel_settings())
    errors = relative_errors(gradients(case, inputs, all_coarse(case)), want)
    plain = relative_errors(plain_attention(inputs, **case.settings()), want)
    assert all(errors[name] <= 2 * plain[name] for name in plain), (errors, plain)


def test_float16_slots_hold_what_one_key_is_owed(rng):
    """All queries see one pooled row, whose own gradient float16 could not hold."""
    case = dataclasses.replace(ONE, dtype=torch.float16, level=8, q_len=64, kv_len=8)
    inputs = case.inputs(rng)
    inputs.dout.fill_(4000)
    got = gradients(case, inputs, all_coarse(case))
    np.testing.assert_allclose(got.dv, 64 * 4000 / 8, rtol=1e-3)


def test_a_slot_that_nobody_wrote_shows(rng):
    """The poison that the other tests rely on: a list with one query block too many."""
    case = dataclasses.replace(ONE, level=8)
    q, k, v, levels, dout, dlse = case.inputs(rng)
    geometry = Geometry(case.q_len, case.kv_len, case.block_m, case.block_n, is_causal=False)
    too_many = key_plan(levels, geometry)
    levels[0, 0, 1, 2] = 0
    right = key_plan(levels, geometry)
    out, lse = forward(q, k, v, levels, **case.kernel_settings())

    def dk(by_key):
        by_query = query_plan(levels, geometry)
        rows = rows_of_pyramid(build_pyramid(k, v, case.block_n))
        rest = (rows, levels, by_query, by_key, out, lse)
        scale = case.kernel_settings()["scale"]
        return backward_planned(
            dout, dlse, q, *rest, geometry, scale=scale, config=all_coarse(case)
        )[1]

    assert dk(right).isfinite().all()
    wrong = ~dk(too_many).isfinite()
    assert wrong[0, 0, 128:192].all() and not wrong[0, 0, :128].any()


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_rounds_of_heads(kv_heads, rng):
    case = Case(batch=2, heads=4, kv_heads=kv_heads, q_len=200, kv_len=333)
    blocks = -(-case.q_len // case.block_m)
    group = 4 // kv_heads * blocks * 2 * 6 * 32 * case.head_dim * 4
    check(case, rng, workspace=3 * group)
