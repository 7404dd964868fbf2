"""Every shipped kernel configuration lowers for CUDA, on a machine without a GPU.

Lowering checks the sizes of copies and of shared memory, alignment and layouts. What the machine
code then holds is checked by `tests/gates/mosaic_aot.py`, which needs NVIDIA's compiler.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import pytest

from psa_jax.attention import mosaic
from psa_jax.attention.mosaic.config import SlotConfig, WalkConfig, default_config

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
    slots = dataclasses.replace(config.slots, levels=(4, 8), workspace_bytes=1, blocks=8)
    config = dataclasses.replace(config, slots=slots)
    assert kernels_in(lower(**shape, config=config)) == KERNELS + 2


@pytest.mark.parametrize(
    ("wrong", "named"), [({"tile": 96}, "tile"), ({"stages": 1}, "stages")], ids=str
)
def test_sizes_that_no_kernel_takes_are_refused(wrong, named):
    right = {"tile": 64, "stages": 2, "consumer_registers": 232, "producer_registers": 40}
    make = functools.partial(WalkConfig, **{**right, **wrong})
    with pytest.raises(ValueError, match=named):
        make()


@pytest.mark.parametrize(
    ("wrong", "named"), [({"tiles": 5}, "tiles"), ({"levels": (2, 8)}, "levels")], ids=str
)
def test_slots_that_no_kernel_takes_are_refused(wrong, named):
    right = {"tiles": 4, "query_slots": 1, "consumer_registers": 232, "producer_registers": 40}
    make = functools.partial(SlotConfig, **{**right, **wrong})
    with pytest.raises(ValueError, match=named):
        make()
