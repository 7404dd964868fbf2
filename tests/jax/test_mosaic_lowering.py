"""Every shipped kernel configuration lowers for CUDA, on a machine without a GPU.

Lowering checks the sizes of copies and of shared memory, alignment and layouts. What the machine
code then holds is checked by `tests/gates/mosaic_aot.py`, which needs NVIDIA's compiler.
"""

import dataclasses
import functools
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from psa_jax.attention import mosaic
from psa_jax.attention.mosaic.configs import CoarseConfig, WalkConfig, default_config

pytestmark = pytest.mark.timeout(240)


KERNELS = 5
"""Forward, dq, dk and dv by key tiles, and the two that make and sum slots."""


def lower(*, head_dim, block_m, block_n, is_causal, dtype="bfloat16", length=1000, config=None):
    """Text of forward and backward lowered for CUDA."""
    q = jax.ShapeDtypeStruct((1, 4, length, head_dim), dtype)
    k = jax.ShapeDtypeStruct((1, 2, length - 7, head_dim), dtype)
    levels = jax.ShapeDtypeStruct(
        (1, 4, -(-length // block_m), -(-(length - 7) // block_n)), jnp.int32
    )
    options = {
        "block_m": block_m,
        "block_n": block_n,
        "scale": head_dim**-0.5,
        "is_causal": is_causal,
        "config": config,
    }

    @jax.jit
    def both(q, k, levels):
        out, lse = mosaic.forward(q, k, k, levels, **options)
        return out, mosaic.backward(out, lse, q, k, k, levels, out, lse, **options)

    return both.trace(q, k, levels).lower(lowering_platforms=("cuda",)).as_text()


def kernels_in(text: str) -> int:
    return text.count("stablehlo.custom_call @mosaic_gpu")


FAST = [
    {"head_dim": 128, "block_m": 128, "block_n": 64, "is_causal": False},
    {"head_dim": 64, "block_m": 64, "block_n": 32, "is_causal": True, "dtype": "float16"},
]
ALL = [
    dict(zip(("head_dim", "block_m", "block_n", "is_causal", "dtype"), values, strict=True))
    for values in itertools.product(
        (64, 128), (64, 128), (32, 64, 128), (False, True), ("float16", "bfloat16")
    )
]


@pytest.mark.parametrize("shape", FAST, ids=str)
def test_lowers_for_cuda(shape):
    assert kernels_in(lower(**shape)) == KERNELS


def test_level_1_is_read_from_the_keys_and_values():
    """The kernels of forward, dq and dk and dv take them as they are: nothing has copied them."""
    text = lower(**FAST[0], length=1031)
    tokens, pooled = "tensor<2x1024x128xbf16>", "tensor<2x896x128xbf16>"
    assert text.count(f"{tokens}, {pooled}, {tokens}, {pooled}, ") == 3
    assert "x1920x128xbf16>" not in text


@pytest.mark.slow
@pytest.mark.parametrize("shape", ALL, ids=str)
def test_every_configuration_lowers_for_cuda(shape):
    assert kernels_in(lower(**shape)) == KERNELS


@pytest.mark.slow
def test_long_sequences_lower_for_cuda():
    assert kernels_in(lower(**FAST[0], length=69_120)) == KERNELS


def test_too_much_shared_memory_is_refused_here_already():
    fits = default_config(128, 128)
    too_big = dataclasses.replace(fits, forward=dataclasses.replace(fits.forward, stages=3))
    with pytest.raises(ValueError, match="shared memory"):
        lower(**FAST[0], config=too_big)


@pytest.mark.slow
@pytest.mark.parametrize("shape", FAST, ids=str)
def test_level_4_in_slots_and_split_rounds_lower_for_cuda(shape):
    config = default_config(shape["head_dim"], shape["block_m"])
    coarse = dataclasses.replace(config.coarse, levels=(4, 8), workspace_bytes=1, blocks=8)
    config = dataclasses.replace(config, coarse=coarse)
    assert kernels_in(lower(**shape, config=config)) == KERNELS + 2


@pytest.mark.parametrize(
    ("wrong", "named"), [({"tile": 96}, "tile"), ({"stages": 1}, "stages")], ids=str
)
def test_sizes_that_no_kernel_takes_are_refused(wrong, named):
    right = {"tile": 64, "stages": 2, "multiply_registers": 232, "copy_registers": 40}
    make = functools.partial(WalkConfig, **{**right, **wrong})
    with pytest.raises(ValueError, match=named):
        make()


@pytest.mark.parametrize(
    ("wrong", "named"), [({"tiles": 5}, "tiles"), ({"levels": (2, 8)}, "levels")], ids=str
)
def test_slots_that_no_kernel_takes_are_refused(wrong, named):
    right = {"tiles": 4, "query_stages": 1, "multiply_registers": 232, "copy_registers": 40}
    make = functools.partial(CoarseConfig, **{**right, **wrong})
    with pytest.raises(ValueError, match=named):
        make()


SHARDED = """
import sys
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from psa_jax import importance, psa_attention
from psa_jax.attention import mosaic

mosaic.device_reason = lambda x: None  # the kernels are lowered, not run
importance._against_kernel = lambda *_: None

explicit = sys.argv[1] == "explicit"
axes = AxisType.Explicit if explicit else AxisType.Auto
mesh = jax.make_mesh((2, 2), ("data", "heads"), axis_types=(axes, axes))
spec = P("data", "heads")


def zeros(*shape):
    return jax.device_put(jnp.zeros(shape, "bfloat16"), NamedSharding(mesh, spec))


def attend(q, k, v):
    return psa_attention(
        q, k, v, causal=True, block_m=128, block_n=64, implementation="mosaic", return_lse=True
    )


if not explicit:
    attend = jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec)


def both(q, k, v):
    out, pull = jax.vjp(attend, q, k, v)
    return out, pull(out)


arrays = zeros(2, 8, 300, 64), *[zeros(2, 4, 293, 64)] * 2
print(jax.jit(both).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text())
"""


@pytest.mark.parametrize("axes", ["explicit", "automatic, inside shard_map"])
def test_sharded_batch_and_heads_stay_where_they_are(axes):
    """Each of four devices launches every kernel for its own batch entry and half of the heads."""
    flags = "--xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-c", SHARDED, axes],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert kernels_in(done.stdout) == KERNELS + 1  # and the scores
    assert "tensor<4x304x64xbf16>, tensor<2x" in done.stdout  # q and k of one device
    assert "tensor<16x304x64xbf16>" not in done.stdout  # q of all devices
    assert not re.search(r"stablehlo\.(all_|collective|reduce_scatter)", done.stdout)
