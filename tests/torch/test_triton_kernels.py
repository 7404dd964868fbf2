"""What the Triton attention kernels promise beyond the contract: tile sizes, padding, refusals."""

import dataclasses

import numpy as np
import pytest
import torch

from psa_torch.attention import triton as triton_attention
from psa_torch.attention.triton import configs
from psa_torch.attention.triton.backward_pass import backward, backward_planned
from psa_torch.attention.triton.configs import (
    BackwardConfig,
    CoarseGradConfig,
    ForwardConfig,
    KeyGradConfig,
    QueryGradConfig,
)
from psa_torch.attention.triton.forward_pass import forward, forward_planned
from psa_torch.attention.triton.plan import key_plan, query_plan
from psa_torch.attention.triton.rows import rows_of_pyramid
from psa_torch.pyramid import build_pyramid
from shared_specs.constants import BLOCK_M, BLOCK_N
from shared_specs.geometry import Geometry
from shared_specs.pyramid import pooled_counts
from tests.torch.attention_contract import Case, Results, assert_close, expected, to_numpy

TOLERANCE = 2e-6


@pytest.fixture(autouse=True)
def poisoned():
    """Every uninitialised tensor holds NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def check(case: Case, rng, forward_config=None, backward_config=None) -> Results:
    inputs = case.inputs(rng)
    q, k, v, levels, dout, dlse = inputs
    out, lse = forward(q, k, v, levels, config=forward_config, **case.kernel_settings())
    grads = backward(
        dout, dlse, q, k, v, levels, out, lse, config=backward_config, **case.kernel_settings()
    )
    got = Results(*(to_numpy(x) for x in (out, lse, *grads)))
    assert_close(got, expected(inputs, **case.kernel_settings()), TOLERANCE)
    return got


def forward_tiles(rows, tile, tail, contiguous):
    return ForwardConfig(rows=rows, tile=tile, tail=tail, contiguous=contiguous, warps=4, stages=2)


def backward_tiles(query_rows, tile, tail, key_rows, keys, block_n=64):
    """Key blocks with at least `keys` rows of a level hold them, the others' go by query blocks."""
    key = KeyGradConfig(keys=keys, rows=key_rows, warps=4, stages=2)
    pooled = CoarseGradConfig(tile=tile, rows=query_rows, warps=4, stages=2)
    return BackwardConfig(
        query=QueryGradConfig(rows=query_rows, tile=tile, tail=tail, warps=4, stages=2),
        key=tuple(key if block_n >> g >= keys else pooled for g in range(4)),
    )


@pytest.mark.parametrize(
    ("rows", "tile", "tail", "contiguous"),
    [(64, 32, 16, True), (64, 32, 64, False), (32, 16, 16, True), (64, 64, 32, True)],
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_tile_sizes_do_not_change_the_answer(rows, tile, tail, contiguous, is_causal, rng):
    case = Case(batch=1, kv_heads=1, q_len=150, kv_len=333, is_causal=is_causal)
    check(
        case,
        rng,
        forward_tiles(rows, tile, tail, contiguous),
        backward_tiles(rows, tile, tail, key_rows=rows, keys=tile),
    )


def test_rows_of_long_streams_run_in_full_tiles(rng):
    """Every level has both full tiles and a remainder."""
    case = Case(batch=1, heads=1, kv_heads=1, q_len=64, kv_len=2000, block_n=32)
    check(
        case, rng, forward_tiles(64, 32, 16, True), backward_tiles(64, 32, 16, 64, 16, block_n=32)
    )


@pytest.mark.parametrize("scale", [0.0, -0.4, 1.0, 3000.0])
def test_any_scale(scale, rng):
    case = Case(batch=1, heads=1, kv_heads=1, block_n=32, scale=scale, head_dim=64)
    inputs = case.inputs(rng)
    out, lse = forward(*inputs[:4], **case.kernel_settings())
    want = expected(inputs, **case.kernel_settings())
    # Rounding of the largest logits is what float32 leaves.
    tolerance = max(TOLERANCE, 2**-23 * np.abs(want.lse).max())
    assert np.abs(to_numpy(out) - want.out).max() <= tolerance * np.abs(to_numpy(inputs.v)).max()
    np.testing.assert_allclose(to_numpy(lse), want.lse, rtol=1e-6, atol=1e-6)


def test_logits_below_every_finite_sentinel_keep_their_weight(rng):
    """Rows whose logits are all hugely negative are seen, not empty."""
    case = Case(batch=1, heads=1, kv_heads=1, q_len=64, kv_len=100, level=2)
    inputs = case.inputs(rng)
    q, k = torch.zeros_like(inputs.q), torch.zeros_like(inputs.k)
    q[..., 0], k[..., 0] = 1e18, -1e18
    out, lse = forward(q, k, inputs.v, inputs.levels, **case.kernel_settings())
    mean = inputs.v.double().mean(2, keepdim=True).expand(out.shape)
    torch.testing.assert_close(out.double(), mean, atol=1e-6, rtol=0)
    logit = -1e36 * case.head_dim**-0.5
    torch.testing.assert_close(lse, torch.full_like(lse, logit), rtol=1e-6, atol=0)


@pytest.mark.parametrize("is_causal", [False, True])
def test_rows_that_cover_no_key_are_never_used(is_causal, rng):
    case = Case(batch=1, kv_heads=1, q_len=130, kv_len=195, is_causal=is_causal)
    q, k, v, levels, dout, dlse = case.inputs(rng)
    geometry = Geometry(case.q_len, case.kv_len, case.block_m, case.block_n, is_causal)
    by_query = query_plan(levels, geometry)
    config = backward_tiles(64, 32, 16, key_rows=32, keys=32)
    by_key = key_plan(levels, geometry)
    empty = torch.from_numpy(pooled_counts(case.kv_len, case.block_n) == 0)
    assert empty.any()

    def results(fill):
        pyramid = build_pyramid(k, v, case.block_n)
        for rows in pyramid:
            rows[:, :, empty] = fill
        out, lse = forward_planned(q, pyramid, by_query, geometry, scale=0.2)
        rest = (rows_of_pyramid(pyramid), levels, by_query, by_key, out, lse)
        grads = backward_planned(dout, dlse, q, *rest, geometry, scale=0.2, config=config)
        return out, lse, *grads

    for clean, poisoned in zip(results(0.0), results(float("nan")), strict=True):
        assert torch.equal(clean, poisoned)


def test_planned_calls_with_lengths_of_one(rng):
    """Arguments that equal 1 are compiled in."""
    check(Case(batch=1, heads=1, kv_heads=1, q_len=1, kv_len=1, level=8), rng)


def test_gradient_of_lse_is_optional(rng):
    case = Case(batch=1, heads=1, kv_heads=1)
    inputs = case.inputs(rng)
    inputs.dlse.zero_()
    q, k, v, levels, dout, dlse = inputs
    out, lse = forward(q, k, v, levels, **case.kernel_settings())
    given = backward(dout, dlse, q, k, v, levels, out, lse, **case.kernel_settings())
    absent = backward(dout, None, q, k, v, levels, out, lse, **case.kernel_settings())
    for x, y in zip(given, absent, strict=True):
        assert torch.equal(x, y)


def test_no_batch(rng):
    case = Case(batch=0)
    q, k, v, levels, dout, dlse = case.inputs(rng)
    out, lse = forward(q, k, v, levels, **case.kernel_settings())
    grads = backward(dout, dlse, q, k, v, levels, out, lse, **case.kernel_settings())
    assert out.shape == q.shape and [x.shape for x in grads] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"head_dim": 36}, "head dimension must be a multiple of 8 in 8..256, got 36"),
        ({"value_dim": 264}, "head dimension must be a multiple of 8 in 8..256, got 264"),
        ({"dtype": torch.float64}, "dtype must be one of float32, float16, bfloat16"),
        ({"block_n": 16}, "block_n one of"),
    ],
)
def test_refusals_say_what_is_accepted(change, reason, rng):
    case = dataclasses.replace(Case(), **change)
    q, k, v = case.inputs(rng)[:3]
    assert reason in triton_attention.unsupported(q, k, v, case.block_m, case.block_n)
    assert triton_attention.unsupported(*Case().inputs(rng)[:3], 64, 64) is None


def test_a_pyramid_beyond_32_bit_offsets_is_refused():
    k = torch.empty(1, 1, 2**25, 64, device="meta")
    q = torch.empty(1, 1, 64, 64)
    assert "2**31" in triton_attention.unsupported(q, k, k, 64, 64)


@pytest.mark.parametrize("dtype", configs.DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", configs.HEAD_DIMS)
def test_tile_sizes_divide_their_blocks(dtype, head_dim):
    for capability in ((8, 0), (9, 0), (10, 0)):
        for block_m in BLOCK_M:
            for block_n in BLOCK_N:
                key = (capability, head_dim, dtype, block_m, block_n)
                backward_sizes = configs.choose_plain_backward(*key)
                rows = [configs.choose_plain_forward(*key).rows, backward_sizes.query.rows]
                rows += [level.rows for level in backward_sizes.key]
                assert all(block_m % size == 0 for size in rows)
                assert isinstance(backward_sizes.key[0], KeyGradConfig)
                assert isinstance(backward_sizes.key[3], CoarseGradConfig)
                for g, level in enumerate(backward_sizes.key):
                    if isinstance(level, KeyGradConfig):
                        assert level.keys >= 16 and (block_n >> g) % level.keys == 0
