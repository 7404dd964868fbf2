"""The pyramid kernel against the NumPy specification."""

import numpy as np
import pytest
import torch

from psa_torch.kernels.pyramid import build_pyramid
from shared_specs import pyramid as spec
from tests.torch.kernel_device import DEVICE, INTERPRETED, to_device, to_numpy

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize(
    ("length", "block_n", "head_dim"), [(1, 32, 8), (7, 64, 24), (128, 64, 128), (300, 128, 64)]
)
def test_equals_the_specification(rng, length, block_n, head_dim):
    k, v = rng.standard_normal((2, 2, 3, length, head_dim)).astype(np.float32)
    got = build_pyramid(to_device(k), to_device(v), block_n)
    for x, want in zip(got, spec.build_pyramid(k, v, block_n), strict=True):
        assert x.is_contiguous()
        np.testing.assert_allclose(to_numpy(x), want, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(to_numpy(got[0])[:, :, :length], k)
    empty = spec.pooled_counts(length, block_n) == 0
    assert all((to_numpy(x)[:, :, empty] == 0).all() for x in got)


def test_values_of_another_head_dimension(rng):
    k, v = (rng.standard_normal((2, 3, 45, d)).astype(np.float32) for d in (72, 16))
    got = build_pyramid(to_device(k), to_device(v), 32)
    for x, want in zip(got, spec.build_pyramid(k, v, 32), strict=True):
        np.testing.assert_allclose(to_numpy(x), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("length", "block_n", "head_dim"), [(7, 64, 24), (300, 128, 64)])
def test_without_level_1_are_the_other_levels(rng, length, block_n, head_dim):
    k, v = (to_device(x) for x in rng.standard_normal((2, 2, 3, length, head_dim), np.float32))
    padded = spec.padded_length(length, block_n)
    got = build_pyramid(k, v, block_n, with_level_1=False)
    for x, whole in zip(got, build_pyramid(k, v, block_n), strict=True):
        assert x.is_contiguous() and torch.equal(x, whole[:, :, padded:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_once(rng, dtype):
    k, v = (to_device(x, dtype) for x in rng.standard_normal((2, 1, 2, 77, 16)))
    got = build_pyramid(k, v, 32)
    want = spec.build_pyramid(to_numpy(k), to_numpy(v), 32)
    for x, y in zip(got, want, strict=True):
        assert x.dtype == dtype
        # Triton's interpreter cuts bfloat16 off where a GPU rounds to the nearest.
        steps = 1.01 if INTERPRETED and dtype == torch.bfloat16 else 0.51
        np.testing.assert_allclose(to_numpy(x), y, rtol=steps * torch.finfo(dtype).eps, atol=1e-6)


def test_strides_and_what_lies_outside(rng):
    """[B, L, H, D] views cut out of larger NaN buffers, each with strides of its own."""
    k, v = (to_device(x, torch.float32) for x in rng.standard_normal((2, 2, 45, 3, 16)))
    k_buffer = torch.full((2, 60, 3, 20), torch.nan, device=DEVICE)
    v_buffer = torch.full((2, 3, 16, 50), torch.nan, device=DEVICE)
    k_view = k_buffer[:, :45, :, :16].copy_(k).transpose(1, 2)
    v_view = v_buffer[..., :45].transpose(2, 3).copy_(v.transpose(1, 2))
    got = build_pyramid(k_view, v_view, 64)
    want = build_pyramid(k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous(), 64)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_refuses_a_dtype_it_cannot_accumulate():
    k = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    with pytest.raises(TypeError, match="k must be float16, bfloat16, float32"):
        build_pyramid(k, k, 32)
