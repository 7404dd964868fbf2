"""Every torch implementation keeps its contract on a CUDA device."""

import numpy as np
import pytest
import torch

from psa_torch import sparse_attention
from tests.torch.attention_contract import (
    AttentionContract,
    Case,
    assert_close,
    expected,
    plain_attention,
    relative_errors,
    run,
)

pytestmark = pytest.mark.gpu


class TestGather(AttentionContract):
    implementation = "gather"
    device = "cuda"


class TestTriton(AttentionContract):
    implementation = "triton"
    device = "cuda"


@pytest.mark.parametrize("implementation", [None, "gather", "triton"])
def test_compiled_call_and_gradients(implementation, rng):
    case = Case(head_dim=64, heads=4, kv_heads=2, is_causal=True, q_len=300, kv_len=300)
    inputs = case.inputs(rng, "cuda")

    def attend(q, k, v, levels):
        return sparse_attention(
            q, k, v, levels, implementation=implementation, return_lse=True, **case.settings()
        )

    leaves = [x.requires_grad_() for x in inputs[:3]]
    out, lse = torch.compile(attend, fullgraph=True)(*leaves, inputs.levels)
    grads = torch.autograd.grad((out, lse), leaves, (inputs.dout, inputs.dlse))
    eager = run(inputs, implementation, **case.settings())
    for x, y in zip((out, lse, *grads), eager, strict=True):
        np.testing.assert_array_equal(x.detach().double().cpu().numpy(), y)
    assert_close(eager, expected(inputs, **case.settings()), AttentionContract.tolerance)


DIMENSIONS = [(8, None), (40, None), (72, None), (80, None), (96, None), (120, None)]
DIMENSIONS += [(160, None), (192, None), (192, 128), (64, 128), (96, 72)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("head_dim", "value_dim"), DIMENSIONS)
def test_head_dimensions_between_the_widths_of_kernels(head_dim, value_dim, dtype, rng):
    """Those for Hopper read 40 to 120 through boxes of 64 or 128 columns."""
    case = Case(
        head_dim=head_dim, value_dim=value_dim, dtype=dtype, block_m=128, q_len=300, kv_len=1000,
        heads=4, kv_heads=4,
    )  # fmt: skip
    inputs = case.inputs(rng, "cuda")
    inputs.levels[..., 0] = 1  # the yardstick has no rule for rows that see nothing
    want = expected(inputs, **case.settings())
    errors = relative_errors(run(inputs, "triton", **case.settings()), want)
    plain = relative_errors(plain_attention(inputs, **case.settings()), want)
    assert all(errors[name] <= 2 * plain[name] for name in plain), (errors, plain)
    settings = {**case.settings(), "is_causal": True}
    causal = relative_errors(run(inputs, "triton", **settings), run(inputs, "gather", **settings))
    assert max(causal.values()) <= 4 * max(plain.values()), (causal, plain)


def test_sequences_of_different_lengths(rng):
    case = Case(batch=3, heads=4, kv_heads=2, head_dim=64, block_m=128, q_len=300, kv_len=400)
    inputs = case.inputs(rng, "cuda")
    lens = {"q_lens": [300, 77, 200], "kv_lens": [129, 400, 1]}
    tensors = {name: torch.tensor(x, device="cuda") for name, x in lens.items()}
    inputs.k[0, :, 129:], inputs.v[0, :, 129:], inputs.q[1, :, 77:] = 3 * (torch.nan,)
    got = run(inputs, "triton", **case.settings(), **tensors)
    want = run(inputs, "gather", **case.settings(), **tensors)
    assert_close(got, want, AttentionContract.tolerance)
