"""The mosaic kernels in Pallas' interpreter, against the float64 oracle.

The interpreter runs every warpgroup, copy and barrier; its race detector (JAX 0.12 and
later) raises on reads and writes of shared memory that no barrier orders. Outputs and shared
memory start as NaN. It is slow, so every case is a few tiles; older JAX runs two of them.
"""

import dataclasses
import functools
import types

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax import sparse_attention
from psa_jax._mosaic.device import reset
from psa_jax.attention import mosaic
from psa_jax.attention.mosaic import api, forward_kernel, walk
from psa_jax.attention.mosaic.coarse_gradient import partials
from psa_jax.attention.mosaic.configs import Config, default_config
from psa_jax.attention.mosaic.geometry import CHUNK
from psa_jax.attention.mosaic.pyramid_rows import copy_rows
from tests.jax.attention_contract import (
    Case,
    assert_close,
    expected,
    plain_attention,
    relative_errors,
    run,
)

RACES = tuple(map(int, jax.__version__.split(".")[:2])) >= (0, 12)
SLOW_ON_OLD = () if RACES else (pytest.mark.slow,)
TOLERANCE = {"bfloat16": 4e-3, "float16": 5e-4}
"""Half a unit in the last place, relative: what rounding the result alone may cost."""

pytestmark = pytest.mark.timeout(240)

SMALL = Case(
    batch=1, heads=1, kv_heads=1, head_dim=64, dtype="bfloat16", block_m=128, q_len=100, kv_len=200
)
case_of = functools.partial(dataclasses.replace, SMALL)

CASES = [
    case_of(level=1, kv_len=130),
    case_of(level=8, block_n=32, kv_len=310, dtype="float16"),
]
NEWER = [
    case_of(heads=2, kv_heads=1, block_n=64, kv_len=300),
    case_of(block_m=64, block_n=128, q_len=130, kv_len=260, is_causal=True),
    case_of(level="empty", heads=2, kv_heads=2, block_m=64),
    case_of(level=4, block_n=128, q_len=128, kv_len=256, scale=-0.2),
    case_of(head_dim=32, kv_len=130),
    case_of(head_dim=40, q_len=130, heads=2),
]
SLOW = [
    case_of(level=2),
    case_of(level=0),
    case_of(head_dim=128),
    case_of(head_dim=128, block_m=64, q_len=192),
    case_of(head_dim=72, is_causal=True),
    case_of(head_dim=8, kv_len=130),
    case_of(q_len=1, kv_len=1),
    case_of(q_len=300, kv_len=77, is_causal=True),
    case_of(q_len=77, kv_len=300, is_causal=True, block_n=32),
    case_of(block_n=32, block_m=64, level="empty", is_causal=True, heads=4, kv_heads=2),
    case_of(block_n=128, q_len=300, kv_len=600, heads=3, kv_heads=1, is_causal=True),
    case_of(batch=2, heads=2, kv_heads=2, block_n=32, dtype="float16"),
    case_of(scale=0.0),
    case_of(scale=30.0),
]


def small(head_dim, block_m, **slots):
    """The default configuration cut small: two thread blocks share all the work."""
    config = default_config(head_dim, block_m)
    cut = functools.partial(dataclasses.replace, blocks=2)
    return Config(
        forward=cut(config.forward, tile=64, stages=2),
        query_gradient=cut(config.query_gradient, tile=64, stages=2),
        key_gradient=cut(config.key_gradient, stages=2),
        coarse=cut(config.coarse, tiles=4, **slots),
    )


@pytest.fixture
def interpreter(monkeypatch):
    """Kernels in the interpreter."""
    monkeypatch.setattr(api, "default_config", small)
    with mosaic.interpreted(detect_races=RACES):
        yield
    reset()  # after an exception the interpreter is not usable until then


@pytest.mark.parametrize(
    "case",
    CASES
    + [pytest.param(case, marks=SLOW_ON_OLD) for case in NEWER]
    + [pytest.param(case, marks=pytest.mark.slow) for case in SLOW],
    ids=str,
)
def test_forward_and_backward(case, interpreter, rng):
    inputs = case.inputs(rng)
    got = run(inputs, "mosaic", **case.settings())
    tolerance = TOLERANCE[case.dtype] * (4 if case.scale == 30.0 else 1)
    assert_close(got, expected(inputs, **case.settings()), tolerance)


def test_query_blocks_without_keys_between_others(interpreter, monkeypatch, rng):
    """Warpgroups that take turns go on where one thread block has nothing to do in between."""
    case = case_of(level=1, q_len=5 * 128, kv_len=130)
    config = small(case.head_dim, case.block_m)
    alone = dataclasses.replace(config.forward, blocks=1)
    monkeypatch.setattr(
        api, "default_config", lambda *_: dataclasses.replace(config, forward=alone)
    )
    inputs = case.inputs(rng)
    inputs = inputs._replace(levels=inputs.levels.at[:, :, 1:4].set(0))
    attend = functools.partial(sparse_attention, implementation="mosaic", **case.settings())
    out = jax.jit(attend)(*inputs[:4])
    want = expected(inputs, **case.settings()).out
    np.testing.assert_allclose(np.asarray(out, np.float64), want, atol=0.02)


SPLIT = {"workspace_bytes": 1}
"""Room for one query block of each thread block: several rounds, with sums carried between."""

SLOTS = [
    pytest.param(case_of(heads=2, kv_heads=1, q_len=200, kv_len=300), SPLIT, marks=SLOW_ON_OLD),
    pytest.param(
        case_of(level=4, q_len=300, kv_len=300, is_causal=True),
        {"levels": (4, 8)},
        marks=SLOW_ON_OLD,
    ),
    pytest.param(
        case_of(batch=2, heads=2, kv_heads=2, block_n=32, block_m=64, kv_len=310, dtype="float16"),
        {"levels": (4, 8), **SPLIT},
        marks=pytest.mark.slow,
    ),
    pytest.param(
        case_of(heads=4, kv_heads=2, block_n=128, q_len=300, kv_len=600, is_causal=True),
        {"levels": (4, 8), "workspace_bytes": 1 << 17},
        marks=pytest.mark.slow,
    ),
    pytest.param(case_of(kv_len=1000), {"levels": ()}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("case", "slots"), SLOTS, ids=str)
def test_slots(case, slots, interpreter, monkeypatch, rng):
    """Slots of a round start as NaN: a sum over one that nobody filled would show."""
    monkeypatch.setattr(api, "default_config", functools.partial(small, **slots))
    inputs = case.inputs(rng)
    got = run(inputs, "mosaic", **case.settings())
    assert_close(got, expected(inputs, **case.settings()), TOLERANCE[case.dtype])


@pytest.mark.parametrize(
    "dtype",
    [pytest.param("bfloat16", marks=SLOW_ON_OLD), pytest.param("float16", marks=pytest.mark.slow)],
)
def test_as_good_as_plain_attention_in_the_same_dtype(dtype, interpreter, rng):
    case = case_of(dtype=dtype, kv_len=192)
    inputs = case.inputs(rng)
    want = expected(inputs, **case.settings())
    ours = relative_errors(run(inputs, "mosaic", **case.settings()), want)
    plain = relative_errors(plain_attention(inputs, **case.settings()), want)
    assert all(ours[name] <= 2 * plain[name] for name in ours), (ours, plain)


def forward_errors(case, rng):
    inputs = case.inputs(rng)
    attend = jax.jit(
        functools.partial(
            sparse_attention, implementation="mosaic", return_lse=True, **case.settings()
        )
    )
    out, lse = attend(*inputs[:4])
    want = expected(inputs, **case.settings())
    error = np.linalg.norm(np.asarray(out, np.float64) - want.out)
    seen = np.isfinite(want.lse)
    np.testing.assert_array_equal(np.isfinite(lse), seen)
    lse_error = np.abs(np.asarray(lse)[seen] - want.lse[seen]).max(initial=0)
    return error / (np.linalg.norm(want.out) or 1), lse_error


READS = [
    case_of(batch=2, heads=2, kv_heads=1, block_n=32, q_len=130, kv_len=301, is_causal=True),
    case_of(batch=2, heads=4, kv_heads=2, block_n=64, block_m=64, q_len=64, kv_len=515),
    case_of(batch=2, heads=2, kv_heads=1, block_n=128, q_len=130, kv_len=523, is_causal=True),
    case_of(level="empty", heads=2, kv_heads=2, block_n=64, q_len=300, kv_len=777),
]


@pytest.mark.parametrize("case", [pytest.param(case, marks=SLOW_ON_OLD) for case in READS], ids=str)
def test_forward_reads_the_right_rows(case, interpreter, rng):
    error, lse_error = forward_errors(case, rng)
    assert error < TOLERANCE[case.dtype] and lse_error < 2e-3


def one_level_for_all(t, ends):
    return jnp.int32(0)


def tail_counted_as_full(packed):
    count, last = packed & 15, packed >> 4
    return jnp.where(count > 0, 8, 0), last


def chunk_before(source, kv_head, start, *rest, **options):
    copy_rows(source, kv_head, jnp.maximum(start - CHUNK, 0), *rest, **options)


MISTAKES = {
    "rows of the chunk before": (case_of(kv_len=300), walk, "copy_rows", chunk_before),
    "no log bias": (
        case_of(kv_len=1024),
        forward_kernel,
        "level_of_tile",
        one_level_for_all,
    ),
    "tail counted as full": (
        case_of(level=8, kv_len=36),
        forward_kernel,
        "unpack_covers",
        tail_counted_as_full,
    ),
}


@pytest.mark.parametrize(
    "mistake",
    [
        "no log bias",
        pytest.param("tail counted as full", marks=SLOW_ON_OLD),
        pytest.param("rows of the chunk before", marks=SLOW_ON_OLD),
    ],
)
def test_a_broken_kernel_is_caught(mistake, interpreter, monkeypatch, rng):
    case, module, name, broken = MISTAKES[mistake]
    monkeypatch.setattr(module, name, broken)
    error, lse_error = forward_errors(case, rng)
    assert error > TOLERANCE["bfloat16"] and lse_error > 0.02


@pytest.mark.skipif(not RACES, reason="JAX before 0.12 records races but does not raise")
def test_a_buffer_filled_too_early_is_a_race(interpreter, monkeypatch, rng):
    """The mistake that no result shows on a good day: a copy that does not wait for readers."""
    impatient = types.SimpleNamespace(**vars(plgpu))
    impatient.barrier_wait = lambda barrier: None
    monkeypatch.setattr(walk, "plgpu", impatient)
    with pytest.raises(Exception, match="[Rr]ace"):
        forward_errors(case_of(level=1, kv_len=512), rng)


@pytest.mark.skipif(not RACES, reason="JAX before 0.12 records races but does not raise")
def test_a_tile_given_back_before_its_gradients_left_is_a_race(interpreter, monkeypatch, rng):
    impatient = types.SimpleNamespace(**vars(plgpu))
    impatient.wait_smem_to_gmem = lambda n, wait_read_only=False: None
    monkeypatch.setattr(partials, "plgpu", impatient)
    case = case_of(level=8, kv_len=3000)
    with pytest.raises(Exception, match="[Rr]ace"):
        run(case.inputs(rng), "mosaic", **case.settings())


@pytest.mark.slow
def test_results_repeat_bit_for_bit(interpreter, rng):
    case = case_of(heads=2, kv_heads=1, kv_len=300)
    inputs = case.inputs(rng)
    first, second = (run(inputs, "mosaic", **case.settings()) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


def test_unsupported_says_why():
    def array(dtype="bfloat16", dim=64):
        return jnp.zeros((1, 1, 128, dim), dtype)

    def reason(x, block_m=128, block_n=64):
        return mosaic.unsupported(x, x, x, block_m, block_n)

    assert "float32" in reason(array("float32"))
    assert "up to 128, got 256" in reason(array(dim=256))
    if jax.default_backend() == "cpu":
        assert "cpu" in reason(array())
        with mosaic.interpreted():
            assert reason(array()) is None
