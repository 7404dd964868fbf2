"""Past the range of float32 (specification, section 4): NaN where a row sees it, nowhere else."""

import dataclasses

import numpy as np
import pytest
import torch

from psa_torch import psa_attention, sparse_attention
from shared_specs import attention as oracle
from tests.torch.attention_contract import Case, expected, to_numpy
from tests.torch.past_float32 import ROWS, assert_rule, ordinary, past_range

# Triton's interpreter computes in NumPy, which says so.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

CASE = Case(batch=1, heads=1, kv_heads=1, q_len=130, kv_len=200, head_dim=32, level=1)
CASES = [
    CASE,
    dataclasses.replace(CASE, level=2),
    dataclasses.replace(CASE, level=8, block_n=32),
    dataclasses.replace(CASE, is_causal=True, scale=0.3),
]


@pytest.mark.parametrize("implementation", ["gather", "triton"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_past_the_range_and_no_others(case, implementation, rng):
    inputs = past_range(case, rng)
    leaves = [x.requires_grad_() for x in inputs[:3]]
    out, lse = sparse_attention(
        *leaves,
        inputs.levels,
        return_lse=True,
        implementation=implementation,
        **case.settings(),
    )
    assert_rule(out, lse)
    want = expected(inputs, **case.settings())
    for got, exact in ((out, want.out), (lse, want.lse)):
        torch.testing.assert_close(
            ordinary(got.detach()), ordinary(torch.from_numpy(exact)), rtol=1e-5, atol=2e-6
        )
    dq, dk, dv = torch.autograd.grad((out, lse), leaves, (inputs.dout, inputs.dlse))
    for row in (ROWS.above, ROWS.undefined):
        assert dq[:, :, row].isnan().any()
    assert not dq[:, :, ROWS.below].any()
    assert dk.isnan().any() and dv.isnan().any()
    last = to_numpy(dq[:, :, 64:])
    np.testing.assert_allclose(last[..., 3:], want.dq[:, :, 64:, 3:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("of", ["oracle", "gather"])
def test_float64_has_the_range_of_float64(of, rng):
    case = dataclasses.replace(CASE, dtype=torch.float64)
    inputs = past_range(case, rng, size=1e170)
    if of == "gather":
        assert_rule(*sparse_attention(*inputs[:4], return_lse=True, **case.settings()))
        return
    arrays = [x.numpy() for x in inputs[:4]]
    found = oracle.sparse_attention(*arrays, return_lse=True, **case.settings())
    assert_rule(*map(torch.from_numpy, found))


@pytest.mark.parametrize("scale", [2.4e38, -2.4e38, 3.5e38, float("inf"), float("nan")])
def test_a_scale_past_the_range_is_refused(scale, rng):
    inputs = CASE.inputs(rng)
    with pytest.raises(ValueError, match="scale must be finite"):
        psa_attention(*inputs[:3], scale=scale)
    settings = {**CASE.settings(), "scale": scale}
    with pytest.raises(ValueError, match="scale must be finite in float32"):
        sparse_attention(*inputs[:4], **settings)


@pytest.mark.parametrize("implementation", ["gather", "triton"])
def test_logits_just_inside_the_range_are_exact(implementation, rng):
    """The largest scale, and the least and the largest logits that it can make."""
    inputs = CASE.inputs(rng)
    q, k = torch.zeros_like(inputs.q), torch.zeros_like(inputs.k)
    k[..., 0] = 1
    q[..., 0] = torch.tensor([-1.0, 1.0]).repeat(CASE.q_len // 2)
    settings = {**CASE.settings(), "scale": 2.3e38}
    out, lse = sparse_attention(
        q, k, inputs.v, inputs.levels, return_lse=True, implementation=implementation, **settings
    )
    mean = inputs.v.mean(2, keepdim=True).expand(out.shape)
    torch.testing.assert_close(out, mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(lse, 2.3e38 * q[..., 0], rtol=1e-6, atol=0)
