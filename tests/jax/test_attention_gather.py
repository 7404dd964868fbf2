"""The gather implementation: against the oracle, in float64, and its work and memory."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from psa_jax import sparse_attention
from psa_jax.attention import gather
from psa_jax.attention.gather import shape as sizes
from psa_jax.attention.gather import visits
from psa_jax.table import build_table
from shared_specs.constants import LEVELS
from tests.jax.attention_contract import (
    QUICK,
    AttentionContract,
    Case,
    Inputs,
    assert_close,
    expected,
    run,
)

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
CASES = {case["name"]: case for case in json.loads((GOLDEN / "index.json").read_text())["cases"]}


class TestGather(AttentionContract):
    implementation = "gather"

    @pytest.mark.parametrize(
        "case",
        [
            Case(head_dim=48, value_dim=16, heads=4),
            Case(head_dim=16, value_dim=40, is_causal=True, block_n=32, level="empty"),
        ],
        ids=str,
    )
    def test_values_of_another_head_dimension(self, case, rng):
        self.test_forward_and_backward(case, rng)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize(
    "case",
    [
        Case(dtype="float64", level="empty", kv_heads=1, q_len=90, kv_len=70, batch=1, head_dim=8),
        Case(dtype="float64", is_causal=True, q_len=70, kv_len=90, batch=1, head_dim=8),
    ],
    ids=str,
)
def test_gradients_in_float64(case, rng, float64):
    inputs = case.inputs(rng)
    assert inputs.q.dtype == jnp.float64
    assert_close(
        run(inputs, "gather", **case.settings()), expected(inputs, **case.settings()), 1e-13
    )

    def attend(q, k, v):
        out, lse = sparse_attention(q, k, v, inputs.levels, return_lse=True, **case.settings())
        return out, jnp.where(jnp.isfinite(lse), lse, 0)

    check_grads(jax.jit(attend), inputs[:3], order=1, modes=["rev"], atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize(("apart", "chunk"), [(True, 1), (False, 3)])
def test_every_way_of_taking_heads_and_blocks(apart, chunk, rng, monkeypatch):
    """Neither the loop over heads nor the number of blocks taken at a time shows in the result."""
    jax.clear_caches()  # of programs made before what follows
    for module in (gather.forward, gather.backward):
        monkeypatch.setitem(module.__globals__, "head_by_head", lambda shape: apart)
    monkeypatch.setattr(sizes.Shape, "chunk", property(lambda shape: chunk))
    monkeypatch.setattr(sizes, "TILE_ROWS", 32)
    case = Case(heads=4, kv_heads=2, q_len=300, kv_len=333, is_causal=True, level="empty")
    inputs = case.inputs(rng)
    assert_close(
        run(inputs, "gather", **case.settings()), expected(inputs, **case.settings()), 2e-6
    )


CHUNKS = Case(q_len=7 * 64, kv_len=350, heads=2, kv_heads=1, level="empty")
"""With tiles of 64 rows, query blocks that need from no tile to six."""


@pytest.fixture
def small_tiles(monkeypatch):
    """One query block at a time, in one pass up to 192 rows, else in tiles of 128."""
    jax.clear_caches()  # of programs made before what follows
    monkeypatch.setattr(sizes.Shape, "chunk", property(lambda shape: 1))
    small = dict(TILE_ROWS=64, ONE_PASS_ROWS=192, ONE_PASS_STEP=64, LOOP_TILES=2)
    for name, value in small.items():
        monkeypatch.setattr(sizes, name, value)
    yield
    jax.clear_caches()


def filling(rng, case) -> Inputs:
    """Inputs whose query block i has i key blocks, all but the last at level 1."""
    inputs = case.inputs(rng)
    levels = np.asarray(rng.choice(LEVELS[1:], inputs.levels.shape))
    for block in range(levels.shape[2]):
        levels[:, :, block, block:] = 0
        levels[:, :, block, : max(0, block - 1)] = 1
    return inputs._replace(levels=jnp.asarray(levels, jnp.int32))


@pytest.mark.parametrize("case", [CHUNKS, dataclasses.replace(CHUNKS, is_causal=True)], ids=str)
def test_every_number_of_tiles(case, rng, small_tiles):
    """In one pass, and tile by tile where there are more."""
    inputs = filling(rng, case)
    shape = sizes.Shape.of(inputs.q, inputs.k, **case.settings() | {"scale": 1.0}).one_head()
    assert shape.one_pass_rows == (64, 128, 192) and shape.loop_rows == 128
    counts = build_table(inputs.levels).counts
    tiles = {int(visits.tiles_used(x, shape, 64)) for x in np.asarray(counts).reshape(-1, 1, 4)}
    assert tiles == set(range(7))
    assert_close(
        run(inputs, "gather", **case.settings()), expected(inputs, **case.settings()), 2e-6
    )


@pytest.mark.parametrize("too_few", [2, 3, 4])
def test_a_missing_tile_is_seen(too_few, rng, small_tiles, monkeypatch):
    def one_less(counts, shape, tile_rows):
        tiles = tiles_used(counts, shape, 64)
        return tiles - (tiles == too_few)

    tiles_used = visits.tiles_used
    monkeypatch.setitem(gather.forward.__globals__, "tiles_used", one_less)
    inputs = filling(rng, CHUNKS)
    with pytest.raises(AssertionError):
        assert_close(
            run(inputs, "gather", **CHUNKS.settings()),
            expected(inputs, **CHUNKS.settings()),
            2e-6,
        )


@pytest.mark.parametrize("block", [0, 3, 7])
def test_rows_that_are_not_selected_are_not_read(block, rng):
    """Keys and values under level 0 may be anything at all."""
    case = Case(q_len=128, kv_len=512, batch=1)
    inputs = case.inputs(rng)
    levels = inputs.levels.at[..., block].set(0).at[..., 1].set(4)
    hole = slice(block * 64, (block + 1) * 64)

    @jax.jit
    def attend(k, v):
        return sparse_attention(inputs.q, k, v, levels, **case.settings())

    want = attend(inputs.k, inputs.v)
    got = attend(*(x.at[:, :, hole].set(jnp.nan) for x in (inputs.k, inputs.v)))
    np.testing.assert_array_equal(got, want)


def test_work_follows_the_mask(rng):
    """The loop over tiles runs as often as the fullest query block of a chunk needs."""
    shape = sizes.Shape.of(
        jnp.zeros((1, 1, 64, 32)),
        jnp.zeros((1, 1, 4096, 32)),
        block_m=64,
        block_n=64,
        scale=1.0,
        is_causal=False,
    )
    for level, rows in ((0, 0), (1, 4096), (2, 2048), (8, 512)):
        table = build_table(jnp.full((1, 1, 1, 1, 64), level))
        assert int(visits.walk(table, shape, jnp.float32, 256).used) == -(-rows // 256)
        assert int(visits.tiles_used(table.counts, shape, 256)) == -(-rows // 256)


def test_nothing_of_dense_size_is_allocated():
    length, d = 16384, 16
    shapes = [jax.ShapeDtypeStruct((1, 1, length, d), jnp.float32)] * 3
    levels = jax.ShapeDtypeStruct((1, 1, length // 128, length // 64), jnp.int32)

    def loss(q, k, v, levels):
        return sparse_attention(q, k, v, levels, block_m=128, block_n=64).sum()

    program = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes, levels).compile(QUICK)
    assert program.memory_analysis().temp_size_in_bytes < length * length * 4 / 8


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case["kind"] == "forward"])
def test_golden_forward(name):
    recorded, data = CASES[name]["config"], np.load(GOLDEN / CASES[name]["file"])
    attend = functools.partial(
        sparse_attention,
        block_m=recorded["block_m"],
        block_n=recorded["block_n"],
        scale=recorded["sm_scale"],
        is_causal=recorded["causal"],
    )
    out = jax.jit(attend)(*(data[x] for x in ("q", "k", "v", "levels")))
    rows = _comparable_rows(name, data, recorded["block_m"])
    assert rows.any()
    np.testing.assert_allclose(np.asarray(out)[rows], data["out"][rows], rtol=0, atol=2e-6)


def test_golden_backward():
    name = "bwd_legacy_200"
    recorded, data = CASES[name]["config"], np.load(GOLDEN / CASES[name]["file"])

    def attend(q):
        return sparse_attention(
            q,
            *(jnp.asarray(data[x]) for x in ("k", "v", "levels")),
            block_m=recorded["block_m"],
            block_n=recorded["block_n"],
            scale=recorded["sm_scale"],
        )

    (dq,) = jax.jit(lambda q, dout: jax.vjp(attend, q)[1](dout))(data["q"], data["do"])
    rows = _comparable_rows(name, data, recorded["block_m"])
    assert rows.any()
    np.testing.assert_allclose(np.asarray(dq)[rows], data["dq"][rows], rtol=0, atol=2e-6)


def _comparable_rows(name, data, block_m):
    """The original counts padding as keys at pooled levels; the specification does not."""
    rows = np.ones(data["q"].shape[:3], bool)
    if name in ("fwd_legacy_tail300", "bwd_legacy_200"):
        ragged_is_exact = data["levels"][..., -1] <= 1
        rows &= np.repeat(ragged_is_exact, block_m, axis=2)[:, :, : rows.shape[2]]
    return rows


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("q_len", [130, 3000])
def test_past_the_range_of_float32(is_causal, q_len, rng):
    """Rows that see a logit above the range are NaN, those with none in range see nothing."""
    q, k, v = (rng.standard_normal((1, 1, n, 16)).astype(np.float32) for n in (q_len, q_len, q_len))
    q[..., :2], k[..., :2] = 0, 1e20
    q[..., 70, 0], q[..., 80, 0], q[..., 80, 1], q[..., 90, 0] = 1e20, 1e20, -1e20, -1e20
    levels = np.ones((1, 1, -(-q_len // 64), -(-q_len // 64)), np.int32)
    out, lse = sparse_attention(
        q, k, v, levels, block_m=64, block_n=64, is_causal=is_causal, return_lse=True
    )
    nan = np.isnan(out[0, 0]).any(-1)
    np.testing.assert_array_equal(np.flatnonzero(nan), [70, 80])
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(lse[0, 0])), [70, 80])
    assert not out[0, 0, 90].any()
    np.testing.assert_array_equal(np.flatnonzero(np.isneginf(lse[0, 0])), [90])
