"""Estimated defects against a loop that says the rule once more, key by key."""

import math

import numpy as np
import pytest

from shared_specs.defect import defect_offsets, defect_scores


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rest_mean", [False, True])
def test_against_loops(causal, rest_mean, rng):
    q, k = rng.standard_normal((1, 2, 139, 8)), rng.standard_normal((1, 1, 171, 8))
    found = defect_scores(
        q,
        k,
        block_m=64,
        block_n=32,
        sample_m=4,
        scale=0.9,
        causal=causal,
        rest_mean=rest_mean,
    )
    assert found.shape == (1, 2, 3, 6, 4) and found.dtype == np.float32
    for h, i, j in [(0, 0, 0), (0, 1, 2), (1, 2, 3), (1, 2, 5), (1, 0, 5)]:
        np.testing.assert_allclose(
            found[0, h, i, j], _looped(q[0, h], k[0, 0], i, j, causal, rest_mean), rtol=1e-5
        )


def _looped(q, k, i, j, causal, rest_mean) -> np.ndarray:
    lost = np.zeros(4)
    for offset in (8, 24, 40, 56):
        r = min(i * 64 + offset, 138)
        last = r + 171 - 139 if causal else 170
        s = [0.9 * float(q[r] @ key) for key in k]
        z = math.log(sum(math.exp(x) for x in s[: last + 1]))

        def mass(level, s=s, z=z, last=last):
            total = 0.0
            for start in range(j * 32, min(j * 32 + 32, 171), level):
                end = min(start + level, 171)
                if end - 1 <= last:
                    mean = sum(s[start:end]) / (end - start)
                    total += (end - start) * math.exp(mean - z)
            return total

        kept = [mass(2), mass(4), mass(8), mass(32) if rest_mean else 0.0]
        lost += [(mass(1) - m) ** 2 / 4 for m in kept]
    return lost


def test_offsets():
    np.testing.assert_array_equal(defect_offsets(128, 8), np.arange(8) * 16 + 8)
    with pytest.raises(ValueError, match="sample_m must be a divisor of block_m=128"):
        defect_offsets(128, 3)
