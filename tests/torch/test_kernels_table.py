"""The table kernel against the NumPy specification, and plans against their definition."""

import numpy as np
import pytest
import torch

from psa_torch.kernels.table import build_plan, build_table
from shared_specs import table as spec
from shared_specs.constants import LEVELS
from tests.torch.kernel_device import to_device, to_numpy

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def random_levels(rng, shape):
    return rng.choice(np.array([0, 1, 2, 4, 8], np.int32), shape, p=[0.4, 0.2, 0.1, 0.1, 0.2])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(2, 2, 5, 17), (1, 1, 1, 1), (1, 1, 40, 2)])
def test_equals_the_specification(rng, shape, transposed):
    levels = random_levels(rng, shape)
    levels[0, 0, 0] = 0
    got = build_table(to_device(levels), transposed)
    for x, want in zip(got, spec.build_table(levels, transposed=transposed), strict=True):
        assert x.is_contiguous() and x.dtype == torch.int32
        np.testing.assert_array_equal(to_numpy(x), want)


def test_long_rows(rng):
    levels = random_levels(rng, (1, 1, 2, 5000))
    got = build_table(to_device(levels))
    for x, want in zip(got, spec.build_table(levels), strict=True):
        np.testing.assert_array_equal(to_numpy(x), want)


def test_heads_may_share_one_mask(rng):
    levels = to_device(random_levels(rng, (1, 1, 4, 9)))
    shared = build_table(levels.expand(2, 3, 4, 9))
    alone = build_table(levels)
    assert all(torch.equal(x, y.expand_as(x)) for x, y in zip(shared, alone, strict=True))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("q_len", "kv_len"), [(200, 200), (130, 327), (320, 150)])
def test_plan(rng, q_len, kv_len, is_causal, transposed):
    block_m, block_n = 64, 32
    n_q, n_k = -(-q_len // block_m), -(-kv_len // block_n)
    levels = random_levels(rng, (1, 2, n_q, n_k))
    entries, counts, full = build_plan(
        to_device(levels),
        q_len=q_len,
        kv_len=kv_len,
        block_m=block_m,
        block_n=block_n,
        is_causal=is_causal,
        transposed=transposed,
    )
    position = np.arange(n_q * block_m) + kv_len - q_len
    key = np.arange(n_k * block_n)
    sees = (key <= position[:, None]) | (not is_causal)
    real_rows = (np.arange(n_q * block_m) < q_len).reshape(n_q, 1, block_m, 1)
    real_keys = (key < kv_len).reshape(1, n_k, 1, block_n)
    sees = sees.reshape(n_q, block_m, n_k, block_n).swapaxes(1, 2)
    levels = np.where((sees & real_rows & real_keys).any((2, 3)), levels, 0)
    whole = (sees | ~real_keys).all((2, 3)) if transposed else (sees & real_keys).all((2, 3))
    want = spec.build_table(levels, transposed=transposed)
    np.testing.assert_array_equal(to_numpy(entries), want.entries)
    np.testing.assert_array_equal(to_numpy(counts), want.counts)
    axis = -2 if transposed else -1
    unmasked = np.stack([((levels == level) & whole).sum(axis) for level in LEVELS], -1)
    np.testing.assert_array_equal(to_numpy(full), unmasked)
