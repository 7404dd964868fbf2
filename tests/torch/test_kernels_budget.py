"""The budget kernels, interpreted on the CPU, against the integers of the specification."""

import dataclasses

import numpy as np
import pytest

from psa_torch.kernels.budget import budget_levels
from shared_specs import PSAConfig
from shared_specs.selection import select_levels
from tests.torch.kernel_device import to_device, to_numpy

HEAD = PSAConfig(
    block_m=64, block_n=32, tile_n=16, mask_mode="budget", importance="defect", budget=0.2
)
MEAN = dataclasses.replace(HEAD, rest="mean")
CASES = {
    "head": (HEAD, 260, 500),
    "mean": (MEAN, 260, 500),
    "row": (dataclasses.replace(MEAN, budget_scope="row"), 300, 420),
    "128 keys": (dataclasses.replace(MEAN, block_n=128, tile_n=32, budget=0.05), 300, 900),
    "causal": (dataclasses.replace(MEAN, causal=True), 333, 333),
    "causal row": (dataclasses.replace(HEAD, causal=True, budget_scope="row"), 129, 400),
    "text and sink": (dataclasses.replace(MEAN, text_length=40, sink_blocks=2), 257, 611),
    "text first": (
        dataclasses.replace(HEAD, text_length=9, text_position="start", causal=True), 257, 257,
    ),
    "one level": (dataclasses.replace(MEAN, budget_levels=(1,)), 200, 500),
    "two levels": (dataclasses.replace(HEAD, budget_levels=(1, 4)), 70, 500),
    "unseen": (dataclasses.replace(HEAD, causal=True), 230, 100),
    "unaffordable": (dataclasses.replace(MEAN, sink_blocks=9, budget=0.01), 200, 320),
    "little": (dataclasses.replace(MEAN, budget=0.02), 200, 500),
    "everything": (dataclasses.replace(MEAN, budget=1.0), 200, 320),
}  # fmt: skip
KINDS = ["even", "skewed", "ties", "zeros", "nan", "tiny", "nan before zeros"]


def defects(rng, kind: str, shape) -> np.ndarray:
    """Defects that grow with the level, as those of attention do, and some that do not."""
    x = np.sort(rng.random(shape, np.float32) ** 2, -1)
    if kind == "skewed":
        x *= np.exp(6 * rng.standard_normal(shape[:-1]))[..., None].astype(np.float32)
    if kind == "ties":
        x = np.round(4 * x) / 4
    if kind == "zeros":
        x *= rng.random(shape[:-1])[..., None] < 0.1
    if kind == "nan":
        x[rng.random(shape) < 0.2] = np.nan
    if kind == "nan before zeros":  # every row is left empty, and NaN is no rank 0
        x = 0 * x
        x[..., ::2, :] = np.nan
    if kind == "tiny":
        x *= np.float32(1e-42)
    return x.astype(np.float32)


@pytest.mark.parametrize(
    "case, kind",
    [(case, KINDS[place % len(KINDS)]) for place, case in enumerate(CASES)]
    + [(case, kind) for case in ("mean", "row") for kind in KINDS]
    + [("little", kind) for kind in ("even", "ties")],
)
def test_integers_of_the_specification(case, kind, rng, poisoned_memory):
    config, q_len, kv_len = CASES[case]
    blocks = -(-q_len // config.block_m), -(-kv_len // config.block_n)
    x = defects(rng, kind, (1, 2, *blocks, 4))
    expected = select_levels(x, config, q_len=q_len, kv_len=kv_len)
    found = to_numpy(budget_levels(to_device(x), config, q_len=q_len, kv_len=kv_len))
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.int32


def test_strided_defects(rng):
    x = defects(rng, "even", (1, 2, 8, 22, 4))
    strided = to_device(np.ascontiguousarray(x.transpose(0, 3, 1, 2, 4))).permute(0, 2, 3, 1, 4)
    found = to_numpy(budget_levels(strided, MEAN, q_len=500, kv_len=700))
    np.testing.assert_array_equal(found, select_levels(x, MEAN, q_len=500, kv_len=700))
