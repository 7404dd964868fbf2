"""The scores kernel lowers for CUDA with every size that ships, on a machine without a GPU."""

import dataclasses
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from psa_jax.kernels.scores import peak_scores
from psa_jax.kernels.scores.tiles import PeakConfig, default_config
from shared_specs.config import PSAConfig

pytestmark = pytest.mark.timeout(240)


def lower(head_dim, *, length=8000, dtype="bfloat16", sizes=None, **fields) -> str:
    q = jax.ShapeDtypeStruct((1, 4, length, head_dim), dtype)
    k = jax.ShapeDtypeStruct((1, 2, length - 7, head_dim), dtype)
    config = PSAConfig(**fields)

    @jax.jit
    def scores(q, k):
        return peak_scores(q, k, config=config, sizes=sizes)

    return scores.trace(q, k).lower(lowering_platforms=("cuda",)).as_text()


def kernels_in(text: str) -> int:
    return text.count("stablehlo.custom_call @mosaic_gpu")


FAST = [
    {"head_dim": 128},
    {"head_dim": 64, "causal": True, "importance_pool": 8, "dtype": "float16"},
    {"head_dim": 128, "importance": "sampled", "sample_m": 7, "sample_n": 3},
]
ALL = [
    {"head_dim": d, "block_m": m, "block_n": n, "tile_n": 8, "causal": c, **rows}
    for d, m, n, c, rows in itertools.product(
        (64, 128),
        (64, 128),
        (32, 64, 128),
        (False, True),
        (
            {"importance_pool": 2},
            {"importance_pool": 8},
            {"importance": "sampled"},
            {"importance": "sampled", "sample_n": 1},
        ),
    )
]


@pytest.mark.parametrize("shape", FAST, ids=str)
def test_lowers_for_cuda(shape):
    assert kernels_in(lower(**shape)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("shape", ALL, ids=str)
def test_every_configuration_lowers_for_cuda(shape):
    assert kernels_in(lower(**shape)) == 1


def test_long_sequences_keep_the_block_maxima_bounded():
    """Written for two of the four heads at a time: those of all take 0.92 GB."""
    text = lower(128, length=120_000)
    assert kernels_in(text) == 1 and "stablehlo.while" in text
    assert "tensor<2x30080x1920xf32>" in text and "tensor<4x30080x1920xf32>" not in text
    assert 2 * 30080 * 1920 * 4 <= default_config(128, 1875, False).most_bytes


def test_too_much_shared_memory_is_refused_here_already():
    too_big = dataclasses.replace(PeakConfig(), stages=6)
    with pytest.raises(ValueError, match="shared memory"):
        lower(128, sizes=too_big)


SHARDED = """
import functools, jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from psa_jax._sharding import per_shard
from psa_jax.kernels.scores import peak_scores
from shared_specs.config import PSAConfig

mesh = jax.make_mesh((2,), ("heads",), axis_types=(AxisType.Explicit,))
x = jax.device_put(jnp.zeros((1, 4, 1000, 64), "bfloat16"), NamedSharding(mesh, P(None, "heads")))
scores = functools.partial(peak_scores, config=PSAConfig(causal=True))
run = jax.jit(lambda q, k: per_shard(scores, q, k))
print(run.trace(x, x).lower(lowering_platforms=("cuda",)).as_text())
"""


def test_sharded_heads_stay_where_they_are():
    """Each of two devices launches the kernel for its own two of four heads."""
    flags = "--xla_force_host_platform_device_count=2"
    done = subprocess.run(
        [sys.executable, "-c", SHARDED],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (kernel,) = (line for line in done.stdout.splitlines() if "custom_call @mosaic_gpu" in line)
    assert "tensor<2x256x64xf32>" in kernel
    assert not re.search(r"stablehlo\.(all_|collective|reduce_scatter)", done.stdout)
