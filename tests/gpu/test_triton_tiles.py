"""Tile sizes and kernels of the Triton attention on a CUDA device: every one gives the answer."""

import dataclasses

import numpy as np
import pytest
import torch

from psa_torch.attention.triton import configs
from psa_torch.attention.triton.backward_pass import backward
from psa_torch.attention.triton.configs import (
    ForwardConfig,
    HopperForwardConfig,
    HopperKeyGradConfig,
    HopperQueryGradConfig,
)
from psa_torch.attention.triton.forward_pass import forward
from shared_specs import attention as oracle
from tests.torch.attention_contract import Case, expected, to_numpy

pytestmark = pytest.mark.gpu

HOPPER = {d: configs.choose_forward((9, 0), d, torch.bfloat16, 128, 64) for d in (64, 128)}

CASES = [
    Case(block_m=128, head_dim=128, q_len=300, kv_len=1000),
    Case(block_m=128, head_dim=64, q_len=128, kv_len=4096, block_n=32),
    Case(block_m=128, head_dim=128, q_len=1, kv_len=1),
    Case(block_m=128, head_dim=128, q_len=500, kv_len=2049, block_n=128, heads=4, kv_heads=2),
    Case(block_m=128, head_dim=128, q_len=700, kv_len=700, level="empty"),
    Case(block_m=128, head_dim=128, q_len=1000, kv_len=1000, is_causal=True, scale=-0.2),
    Case(block_m=128, head_dim=64, q_len=1000, kv_len=333, is_causal=True, block_n=32),
    Case(block_m=128, head_dim=64, q_len=200, kv_len=3000, is_causal=True, level=1),
    # Several query blocks for each multiprocessor.
    Case(block_m=128, head_dim=128, heads=12, kv_heads=4, q_len=2100, kv_len=900),
    Case(block_m=128, head_dim=64, heads=12, kv_heads=4, q_len=2100, kv_len=2100, is_causal=True),
    *(Case(block_m=128, head_dim=128, kv_len=777, level=level) for level in (0, 1, 2, 4, 8)),
]


def hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def check(case: Case, config, rng) -> None:
    """Within a few rounding steps of the dtype from the oracle."""
    inputs = case.inputs(rng, "cuda")
    q, k, v, levels = inputs[:4]
    out, lse = forward(q, k, v, levels, config=config, **case.kernel_settings())
    arrays = (to_numpy(q), to_numpy(k), to_numpy(v), levels.cpu().numpy())
    want, want_lse = oracle.sparse_attention(*arrays, return_lse=True, **case.kernel_settings())
    blind = np.isneginf(want_lse)
    np.testing.assert_array_equal(np.isneginf(to_numpy(lse)), blind)
    assert (to_numpy(out)[blind] == 0).all()
    step = 2.0 ** (-8 if case.dtype == torch.bfloat16 else -11)
    assert np.abs(to_numpy(out) - want).max() <= 4 * step * np.abs(arrays[2]).max()
    assert np.abs(to_numpy(lse) - want_lse)[~blind].max(initial=0) <= 8 * step


@pytest.mark.skipif(not hopper(), reason="needs compute capability 9.0")
@pytest.mark.timeout(120)
class TestHopperForward:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_against_the_oracle(self, case, dtype, rng):
        check(dataclasses.replace(case, dtype=dtype), HOPPER[case.head_dim], rng)

    @pytest.mark.parametrize("head_dim,tile,stages", [(128, 64, 2), (128, 64, 4), (64, 128, 3)])
    def test_ring_sizes(self, head_dim, tile, stages, rng):
        case = dataclasses.replace(CASES[0], dtype=torch.bfloat16, head_dim=head_dim)
        check(case, HopperForwardConfig(tile=tile, stages=stages), rng)

    @pytest.mark.parametrize("gap", [16, 8, 1])
    def test_strided_queries(self, gap, rng):
        """Read where they lie if rows begin at multiples of 16 numbers, else copied first."""
        case = dataclasses.replace(CASES[3], dtype=torch.bfloat16)
        q, k, v, levels = case.inputs(rng, "cuda")[:4]
        wide = torch.full((*q.shape[:3], q.shape[3] + gap), torch.nan, device="cuda").to(q.dtype)
        wide[..., :-gap] = q
        for x, y in zip(
            forward(wide[..., :-gap], k, v, levels, config=HOPPER[128], **case.kernel_settings()),
            forward(q, k, v, levels, config=HOPPER[128], **case.kernel_settings()),
            strict=True,
        ):
            assert torch.equal(x, y)

    def test_same_bits_on_every_run(self, rng):
        case = dataclasses.replace(CASES[3], dtype=torch.bfloat16)
        q, k, v, levels = case.inputs(rng, "cuda")[:4]
        calls = [
            forward(q, k, v, levels, config=HOPPER[case.head_dim], **case.kernel_settings())
            for _ in range(5)
        ]
        for out, lse in calls[1:]:
            assert torch.equal(out, calls[0][0]) and torch.equal(lse, calls[0][1])


@pytest.mark.skipif(not hopper(), reason="needs compute capability 9.0")
@pytest.mark.timeout(120)
class TestHopperQueryGradient:
    def gradients(self, case, config, inputs):
        """dq with this config and with the plain kernel."""
        q, k, v, levels, dout, dlse = inputs
        key = ((9, 0), case.head_dim, case.dtype, case.block_m, case.block_n)
        plain = configs.choose_plain_backward(*key)
        out, lse = forward(q, k, v, levels, **case.kernel_settings())
        return tuple(
            backward(dout, dlse, q, k, v, levels, out, lse, config=x, **case.kernel_settings())[0]
            for x in (dataclasses.replace(plain, query=config), plain)
        )

    @pytest.mark.parametrize("tile,stages,beside", [(64, 4, True), (128, 2, False)])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_no_further_from_the_oracle_than_the_plain_kernel(
        self, case, dtype, tile, stages, beside, rng
    ):
        case = dataclasses.replace(case, dtype=dtype)
        inputs = case.inputs(rng, "cuda")
        want = expected(inputs, **case.kernel_settings())
        config = HopperQueryGradConfig(tile=tile, stages=stages, beside=beside)
        got, plain = self.gradients(case, config, inputs)
        error, plain_error = (np.linalg.norm(to_numpy(x) - want.dq) for x in (got, plain))
        assert (to_numpy(got)[np.isneginf(want.lse)] == 0).all()
        # The second part is for problems whose dq is nothing but rounding.
        assert error <= 1.1 * plain_error + 1e-3 * np.linalg.norm(inputs.dout.float().cpu())

    def test_same_bits_on_every_run(self, rng):
        case = dataclasses.replace(CASES[3], dtype=torch.bfloat16)
        inputs = case.inputs(rng, "cuda")
        config = HopperQueryGradConfig(tile=64, stages=4)
        first, *others = (self.gradients(case, config, inputs)[0] for _ in range(5))
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.skipif(not hopper(), reason="needs compute capability 9.0")
@pytest.mark.timeout(120)
class TestHopperKeyGradient:
    def gradients(self, case, config, inputs):
        """(dk, dv) with this config for every level that has one by key blocks, and with the
        plain kernels."""
        q, k, v, levels, dout, dlse = inputs
        key = ((9, 0), case.head_dim, case.dtype, case.block_m, case.block_n)
        plain = configs.choose_plain_backward(*key)
        by_key = (config if isinstance(x, configs.KeyGradConfig) else x for x in plain.key)
        out, lse = forward(q, k, v, levels, **case.kernel_settings())
        return tuple(
            backward(dout, dlse, q, k, v, levels, out, lse, config=x, **case.kernel_settings())[1:]
            for x in (dataclasses.replace(plain, key=tuple(by_key)), plain)
        )

    @pytest.mark.parametrize("dtype,stages", [(torch.float16, 1), (torch.bfloat16, 4)], ids=str)
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_no_further_from_the_oracle_than_the_plain_kernel(self, case, dtype, stages, rng):
        case = dataclasses.replace(case, dtype=dtype)
        inputs = case.inputs(rng, "cuda")
        want = expected(inputs, **case.kernel_settings())
        config = HopperKeyGradConfig(rows=64, stages=stages)
        for *both, right in zip(
            *self.gradients(case, config, inputs), (want.dk, want.dv), strict=True
        ):
            error, plain_error = (np.linalg.norm(to_numpy(x) - right) for x in both)
            # The second part is for problems whose dk is nothing but rounding.
            assert error <= 1.1 * plain_error + 1e-3 * np.linalg.norm(inputs.dout.float().cpu())

    @pytest.mark.parametrize("rows,stages", [(64, 5), (128, 1)])
    def test_same_bits_with_other_sizes_and_on_every_run(self, rows, stages, rng):
        case = dataclasses.replace(CASES[9], dtype=torch.bfloat16)
        inputs = case.inputs(rng, "cuda")
        first, _ = self.gradients(case, HopperKeyGradConfig(rows=64, stages=2), inputs)
        for _ in range(4):
            again, _ = self.gradients(case, HopperKeyGradConfig(rows=rows, stages=stages), inputs)
            assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("dtype", configs.DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", configs.HEAD_DIMS)
def test_shipped_tile_sizes(head_dim, dtype, rng):
    for block_m, block_n in ((128, 64), (64, 128), (128, 32)):
        case = Case(head_dim=head_dim, block_m=block_m, block_n=block_n, kv_len=900, dtype=dtype)
        check(case, None, rng)


@pytest.mark.parametrize("tile,tail", [(64, 32), (128, 64)])
def test_other_tile_sizes(tile, tail, rng):
    case = dataclasses.replace(CASES[0], dtype=torch.bfloat16)
    check(case, ForwardConfig(rows=128, tile=tile, tail=tail, warps=8, stages=3), rng)
