"""psa_torch.pyramid against the NumPy specification."""

import numpy as np
import pytest
import torch

from psa_torch.pyramid import build_pyramid, group_means, pool_levels, unpool
from shared_specs import pyramid as spec


def tensors(shape, dtype, seed):
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.standard_normal(shape)).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("block_n", [32, 64, 128])
@pytest.mark.parametrize("length", [1, 2, 7, 31, 64, 129, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_specification(length, block_n, dtype):
    k, v = tensors((2, 3, length, 8), dtype, length * block_n)
    got = build_pyramid(k, v, block_n)
    want = spec.build_pyramid(k.numpy(), v.numpy(), block_n)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    for x, y in zip(got, want, strict=True):
        assert x.dtype == dtype and x.shape == y.shape
        np.testing.assert_allclose(x.numpy(), y, rtol=tolerance, atol=tolerance)
    empty = spec.pooled_counts(length, block_n) == 0
    assert (got.k.numpy()[:, :, empty] == 0).all()


@pytest.mark.parametrize("length", [1, 64, 129])
def test_pooled_levels_are_those_of_the_pyramid(length):
    k, v = tensors((2, 3, length, 8), torch.float32, length)
    padded = spec.padded_length(length, 64)
    for x, whole in zip(pool_levels(k, v, 64), build_pyramid(k, v, 64), strict=True):
        assert x.is_contiguous() and torch.equal(x, whole[:, :, padded:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_once(dtype):
    k, v = tensors((1, 2, 77, 16), dtype, 5)
    got = build_pyramid(k, v, 32)
    want = spec.build_pyramid(k.float().numpy(), v.float().numpy(), 32)
    step = torch.finfo(dtype).eps
    for x, y in zip(got, want, strict=True):
        assert x.dtype == dtype
        np.testing.assert_allclose(x.float().numpy(), y, rtol=0.51 * step, atol=1e-6)


def test_padding_is_never_read():
    """Views into a larger NaN buffer: what lies past the end must not reach a mean."""
    buffer = torch.full((1, 2, 80, 8), torch.nan)
    k, v = tensors((1, 2, 45, 8), torch.float32, 3)
    buffer[:, :, :45] = k
    got = build_pyramid(buffer[:, :, :45], v, 64)
    assert torch.equal(got.k, build_pyramid(k, v, 64).k)


@pytest.mark.parametrize("length", [1, 35])
def test_gradient_is_the_transpose_of_pooling(length):
    k, v = (x.requires_grad_() for x in tensors((1, 1, length, 2), torch.float64, length))
    torch.autograd.gradcheck(lambda a, b: tuple(build_pyramid(a, b, 32)), (k, v))


def test_unpool_conserves_the_total():
    rows = torch.randn(2, 1, spec.pyramid_rows(100, 32), 8, generator=torch.Generator())
    real = torch.from_numpy(spec.pooled_counts(100, 32) > 0)
    total = rows[:, :, real].sum(2)
    torch.testing.assert_close(unpool(rows, 100, 32).sum(2), total, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_group_means_with_spare_groups(size):
    x, _ = tensors((1, 1, 13, 8), torch.float32, size)
    want = spec.group_means(x.numpy(), size)
    got = group_means(x, size, want.shape[2] + 2).numpy()
    np.testing.assert_allclose(got[:, :, :-2], want, atol=1e-6)
    assert (got[:, :, -2:] == 0).all()


def test_opcheck():
    k, v = (x.requires_grad_() for x in tensors((1, 2, 45, 8), torch.float32, 1))
    torch.library.opcheck(torch.ops.psa.build_pyramid.default, (k, v, 64))
