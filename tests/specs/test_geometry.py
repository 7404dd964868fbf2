"""What follows from the sizes of a call, against counting."""

import numpy as np
import pytest

from shared_specs.constants import LEVELS
from shared_specs.geometry import Geometry, cdiv
from shared_specs.pyramid import build_pyramid


@pytest.mark.parametrize("block_n", [32, 64, 128])
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (64, 128), (300, 257), (129, 1000)])
def test_a_geometry_is_that_of_the_blocks_and_the_pyramid(q_len, kv_len, block_n, rng):
    g = Geometry(q_len, kv_len, 64, block_n, is_causal=True)
    assert g.q_blocks == len(range(0, q_len, 64)) and g.k_blocks == len(range(0, kv_len, block_n))
    assert g.padded_len == g.k_blocks * block_n >= kv_len > g.padded_len - block_n
    assert q_len - 1 + g.offset == kv_len - 1
    x = rng.standard_normal((1, 1, kv_len, 2))
    pyramid = build_pyramid(x, x, block_n).k[0, 0]
    assert len(pyramid) == g.pyramid_rows == g.padded_len + g.pooled_rows
    for index, level in enumerate(LEVELS):
        # The first row of the level is the mean of the first keys.
        start = g.level_start(index)
        np.testing.assert_allclose(pyramid[start], x[0, 0, :level].mean(0))
        assert g.block_rows(index) * level == block_n
        end = g.level_start(index + 1) if level < 8 else g.pyramid_rows
        assert end - start == g.k_blocks * g.block_rows(index)


def test_cdiv_rounds_up():
    assert [cdiv(x, 4) for x in (0, 1, 4, 5)] == [0, 1, 1, 2]
