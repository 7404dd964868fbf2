"""Every torch implementation keeps its contract on a CUDA device."""

import numpy as np
import pytest
import torch

from psa_torch import sparse_attention
from tests.torch.attention_contract import AttentionContract, Case, assert_close, expected, run

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
