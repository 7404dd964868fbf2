"""What every torch implementation of attention must satisfy: subclass `AttentionContract`.

Everything is compared with the float64 oracle of `shared_specs.attention`.
"""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from psa_torch import sparse_attention
from shared_specs.constants import MASK_LEVELS
from shared_specs.masks import to_segments
from tests.support import attention_cases
from tests.support.attention_cases import (
    FLOAT32_TOLERANCE,
    Inputs,
    Results,
    assert_close,
    relative_errors,
    whole_pyramid,
)


@dataclasses.dataclass(frozen=True)
class Case(attention_cases.Case):
    """One problem, with tensors for inputs."""

    dtype: torch.dtype = torch.float32

    def kernel_settings(self) -> dict:
        """`settings` with the scale that None stands for, as kernels take them."""
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        return {**self.settings(), "scale": scale}

    def inputs(self, rng: np.random.Generator, device: str = "cpu") -> Inputs:
        drawn = Inputs(*map(torch.from_numpy, self.draw(rng)))
        dtypes = Inputs(*(self.dtype,) * 3, torch.int32, self.dtype, self.dtype)
        inputs = Inputs(*(x.to(device, dtype) for x, dtype in zip(drawn, dtypes, strict=True)))
        return inputs._replace(dlse=inputs.dlse.to(lse_dtype(self.dtype)))

    def levels(self, rng: np.random.Generator) -> Tensor:
        return torch.from_numpy(self.draw_levels(rng))


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def to_numpy(x: Tensor) -> np.ndarray:
    return x.detach().double().cpu().numpy()


def run(inputs: Inputs, implementation: str | None, **settings) -> Results:
    """Forward and backward through the public function."""
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    out, lse = sparse_attention(
        *leaves, inputs.levels, implementation=implementation, return_lse=True, **settings
    )
    grads = torch.autograd.grad((out, lse), leaves, (inputs.dout, inputs.dlse))
    assert out.shape == inputs.dout.shape and out.dtype == inputs.q.dtype
    assert lse.shape == inputs.q.shape[:3] and lse.dtype == lse_dtype(inputs.q.dtype)
    for grad, x in zip(grads, leaves, strict=True):
        assert grad.shape == x.shape and grad.dtype == x.dtype
    return Results(*(to_numpy(x) for x in (out, lse, *grads)))


def expected(inputs: Inputs, **settings) -> Results:
    """The oracle's answer to the same inputs, in float64."""
    exact = Inputs(*map(to_numpy, inputs))._replace(levels=inputs.levels.cpu().numpy())
    return attention_cases.expected(exact, **settings)


def plain_attention(inputs: Inputs, *, block_m, block_n, scale, is_causal) -> Results:
    """Dense attention in the dtype of the inputs over the whole pyramid, masked: the yardstick of
    what that dtype can be asked for."""
    assert not is_causal and scale is None
    q, k, v, levels = inputs[:4]
    whole = whole_pyramid(levels.cpu().numpy(), q.shape[2], k.shape[2], block_m, block_n)
    pool, bias = torch.from_numpy(whole.pool).to(q.device), torch.from_numpy(whole.bias).to(q)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    q, k, v = leaves
    k, v = ((pool @ x.double()).to(q.dtype) for x in (k, v))
    logits = (q @ k.mT) * q.shape[-1] ** -0.5 + bias
    lse = logits.float().logsumexp(-1)
    out = logits.softmax(-1) @ v
    grads = torch.autograd.grad((out, lse), leaves, (inputs.dout, inputs.dlse))
    return Results(*(to_numpy(x) for x in (out, lse, *grads)))


SHAPES = [
    Case(block_m=m, block_n=n, q_len=lq, kv_len=lk)
    for m in (64, 128)
    for n in (32, 64, 128)
    for lq, lk in ((256, 256), (200, 333))
]
LENGTHS = [Case(q_len=lq, kv_len=lk) for lq in (1, 65, 130) for lk in (1, 3, 63, 129)]
ALONE = [Case(level=level, kv_len=n) for level in MASK_LEVELS for n in (192, 193, 199, 201)]
CAUSAL = [
    Case(is_causal=True, block_n=n, q_len=lq, kv_len=lk)
    for n in (32, 64, 128)
    for lq, lk in ((256, 256), (77, 300), (300, 77), (1, 130), (200, 201))
]
GROUPED = [
    Case(heads=h, kv_heads=hk, is_causal=causal)
    for h, hk in ((4, 2), (6, 2), (3, 1))
    for causal in (False, True)
]
OTHERS = [
    Case(level="empty"),
    Case(level="empty", is_causal=True, block_n=32),
    Case(scale=0.37),
    Case(scale=-1.5, is_causal=True),
    Case(head_dim=64),
    Case(head_dim=128),
    Case(head_dim=8),
    Case(head_dim=72, is_causal=True, heads=4),
    Case(head_dim=48, value_dim=32),
    Case(head_dim=16, value_dim=72, is_causal=True, block_n=32),
]


class AttentionContract:
    """Tests of one implementation; a subclass names it, and the device or a wider float32
    tolerance if need be."""

    implementation: str
    device = "cpu"
    tolerance = FLOAT32_TOLERANCE

    def check(self, case: Case, rng) -> None:
        inputs = case.inputs(rng, self.device)
        got = run(inputs, self.implementation, **case.settings())
        assert_close(got, expected(inputs, **case.settings()), self.tolerance)

    @pytest.mark.parametrize("case", SHAPES, ids=str)
    def test_block_sizes(self, case, rng):
        self.check(case, rng)

    @pytest.mark.parametrize("case", LENGTHS, ids=str)
    def test_any_length(self, case, rng):
        self.check(case, rng)

    @pytest.mark.parametrize("case", ALONE, ids=str)
    def test_one_level_alone_with_every_tail(self, case, rng):
        self.check(case, rng)

    @pytest.mark.parametrize("case", CAUSAL, ids=str)
    def test_causal_with_offset(self, case, rng):
        self.check(case, rng)

    @pytest.mark.parametrize("case", GROUPED, ids=str)
    def test_grouped_heads(self, case, rng):
        self.check(case, rng)

    @pytest.mark.parametrize("case", OTHERS, ids=str)
    def test_empty_rows_scales_and_head_dimensions(self, case, rng):
        self.check(case, rng)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("block_n", [32, 128])
    def test_low_precision_is_within_twice_the_plain_error(self, dtype, block_n, rng):
        case = Case(block_n=block_n, dtype=dtype)
        inputs = case.inputs(rng, self.device)
        inputs.levels[..., 0] = 1  # the yardstick has no rule for rows that see nothing
        want = expected(inputs, **case.settings())
        errors = relative_errors(run(inputs, self.implementation, **case.settings()), want)
        plain = relative_errors(plain_attention(inputs, **case.settings()), want)
        assert all(errors[name] <= 2 * plain[name] for name in plain), (errors, plain)

    def test_segments_are_the_same_mask(self, rng):
        case = Case(block_n=32)
        inputs = case.inputs(rng, self.device)
        segments = torch.from_numpy(to_segments(inputs.levels.cpu().numpy())).to(self.device)
        for x, y in zip(
            run(inputs, self.implementation, **case.settings()),
            run(inputs._replace(levels=segments), self.implementation, **case.settings()),
            strict=True,
        ):
            np.testing.assert_array_equal(x, y)

    def test_non_contiguous_inputs(self, rng):
        case = Case(heads=4, kv_heads=2)
        inputs = case.inputs(rng, self.device)

        def strided(x):
            return x.transpose(1, 2).contiguous().transpose(1, 2) if x.ndim == 4 else x

        views = Inputs(*(strided(x) for x in inputs))
        assert not any(x.is_contiguous() for x in views[:5])
        assert_close(
            run(views, self.implementation, **case.settings()),
            expected(inputs, **case.settings()),
            self.tolerance,
        )

    def test_same_bits_on_every_run(self, rng):
        case = Case(heads=4, kv_heads=1, q_len=300, kv_len=300)
        inputs = case.inputs(rng, self.device)
        first = run(inputs, self.implementation, **case.settings())
        for _ in range(3):
            again = run(inputs, self.implementation, **case.settings())
            for x, y in zip(first, again, strict=True):
                np.testing.assert_array_equal(x, y)

    def test_large_logits_stay_finite(self, rng):
        case = Case(scale=40.0, is_causal=True)
        inputs = case.inputs(rng, self.device)
        want = expected(inputs, **case.settings())
        # Rounding of logits near 1000 is what float32 leaves, hence the wider bound.
        assert_close(run(inputs, self.implementation, **case.settings()), want, 2e-3)
