"""`scale` as a tensor has a gradient; other tensors are not taken for numbers."""

import numpy as np
import pytest
import torch

from psa_torch import psa_attention, sparse_attention
from shared_specs import PSAConfig


def make_qkv(rng):
    return [torch.from_numpy(rng.normal(size=(1, 2, 128, 16))) for _ in range(3)]


def given_levels(q, k, v, scale):
    levels = torch.tensor([[1, 2]], dtype=torch.int32).expand(1, 2, 1, 2)
    return sparse_attention(q, k, v, levels, block_m=128, block_n=64, scale=scale)


def chosen_levels(q, k, v, scale):
    return psa_attention(q, k, v, scale=scale)


@pytest.mark.parametrize("attend", [given_levels, chosen_levels])
def test_a_tensor_is_its_number_and_gets_a_gradient(rng, attend):
    qkv = make_qkv(rng)
    for scale in (torch.tensor(0.3).double(), torch.tensor([0.2, 0.5]).double()):
        found = attend(*qkv, scale)
        for head, factor in enumerate(scale.expand(2).tolist()):
            one = attend(*(x[:, head : head + 1].expand(-1, 2, -1, -1) for x in qkv), factor)
            torch.testing.assert_close(found[:, head], one[:, 0])
        scale.requires_grad_()
        assert torch.autograd.gradcheck(
            lambda scale: attend(*qkv, scale), scale, eps=1e-6, fast_mode=True
        )


@pytest.mark.parametrize("attend", [given_levels, chosen_levels])
def test_what_is_no_scale_is_refused(rng, attend):
    qkv = make_qkv(rng)
    cases = [
        (torch.ones(3), ValueError, r"scale must be .* \[H\] = \(2,\), got shape \(3,\)"),
        (torch.ones(1, 2), ValueError, r"scale must be .* got shape \(1, 2\)"),
        (torch.tensor(1), TypeError, "scale must be a number or a floating tensor"),
        (np.ones(()), TypeError, "scale must be"),
        (3.5e38, ValueError, "scale must be finite in float32"),
    ]
    for scale, error, message in cases:
        with pytest.raises(error, match=message):
            attend(*qkv, scale)


@pytest.mark.parametrize("attend", [given_levels, chosen_levels])
@pytest.mark.parametrize("number", [np.float32(0.25), np.float64(0.25), np.float16(0.25)])
def test_numpy_scalars_are_numbers(rng, attend, number):
    qkv = make_qkv(rng)
    assert torch.equal(attend(*qkv, number), attend(*qkv, 0.25))


@pytest.mark.parametrize("name", ["sim_2x_threshold", "min_full_ratio", "scale"])
def test_tensors_are_no_fields_of_a_configuration(name):
    with pytest.raises(TypeError, match=f"{name} must be a number, not an array"):
        PSAConfig(**{name: torch.tensor(0.5)})
