"""The warp-specialised dk/dv, run as threads: same answers, no deadlock, no early release."""

import dataclasses
from unittest import mock

import numpy as np
import pytest
import torch

from psa_torch.attention.triton import hopper
from psa_torch.attention.triton.backward_pass import key_gradients
from psa_torch.attention.triton.configs import (
    CoarseGradConfig,
    HopperKeyGradConfig,
    KeyGradConfig,
)
from psa_torch.attention.triton.hopper.units import (
    LEAST_RUN,
    LOG_ENTRY,
    MASKED,
    UNIT_ROWS,
    build_units,
)
from psa_torch.attention.triton.plan import key_plan, query_plan
from psa_torch.attention.triton.row_statistics import launch_row_statistics
from shared_specs.constants import LEVELS
from shared_specs.geometry import Geometry
from tests.support import gluon_interpreter
from tests.support.memory_layouts import rows_copied, rows_in_one_place, strided
from tests.torch.attention_contract import Case, expected

kernels = pytest.importorskip("psa_torch.attention.triton.hopper.key_gradient")

BASE = Case(batch=1, heads=2, kv_heads=1, block_m=128, head_dim=64, q_len=300, kv_len=330)
CASES = [
    BASE,
    dataclasses.replace(BASE, is_causal=True),
    dataclasses.replace(BASE, heads=1, block_m=64, is_causal=True, scale=-0.3),
    dataclasses.replace(BASE, heads=1, block_n=32, is_causal=True),
    dataclasses.replace(BASE, heads=1, block_n=128, is_causal=True),
    dataclasses.replace(BASE, batch=2, heads=4, kv_heads=2, q_len=200, kv_len=150),
    dataclasses.replace(BASE, q_len=300, kv_len=150, is_causal=True, heads=1),
    dataclasses.replace(BASE, heads=1, q_len=1, kv_len=1, level=1),
    dataclasses.replace(BASE, level="empty", batch=2, q_len=200),
    dataclasses.replace(BASE, heads=1, head_dim=128, q_len=200, kv_len=140),
    dataclasses.replace(BASE, heads=1, level=1),
    dataclasses.replace(BASE, heads=1, level=2, block_n=32),
    dataclasses.replace(BASE, heads=1, level=4),
    dataclasses.replace(BASE, heads=1, head_dim=72, is_causal=True, q_len=200, kv_len=150),
]
CONFIGS = [
    HopperKeyGradConfig(rows=64, stages=1),
    HopperKeyGradConfig(rows=64, stages=4),
    HopperKeyGradConfig(rows=128, stages=2),
]
TOLERANCE = 4e-6


@pytest.fixture(autouse=True)
def interpreted(poisoned_memory):
    kernel = gluon_interpreter.Interpreted(kernels.key_gradient_hopper)
    with (
        mock.patch.object(kernels, "key_gradient_hopper", kernel),
        mock.patch.object(hopper, "DTYPES", (torch.float32,)),
    ):
        yield


def gradients(
    inputs,
    want,
    config,
    *,
    block_n,
    coarsest=2,
    shortest=LEAST_RUN,
    rows=rows_in_one_place,
    **settings,
):
    """dk and dv, by the kernel under test up to level `2**coarsest` where blocks have `shortest`
    rows; lse and out are the oracle's `want`."""
    q, k, v, levels, dout, dlse = inputs
    pooled = CoarseGradConfig(tile=32, rows=64, warps=4, stages=1)
    here = tuple(config if g <= coarsest and block_n >> g >= shortest else pooled for g in range(4))
    out, lse = torch.from_numpy(want.out).float(), torch.from_numpy(want.lse).float()
    block_m, is_causal = settings["block_m"], settings["is_causal"]
    geometry = Geometry(q.shape[2], k.shape[2], block_m, block_n, is_causal)
    return key_gradients(
        q,
        rows(k, v, block_n),
        dout,
        launch_row_statistics(out, dout, lse, dlse, block_m),
        levels,
        query_plan(levels, geometry),
        key_plan(levels, geometry),
        geometry,
        scale=settings["scale"],
        config=here,
    )


def check(got, want, dout) -> None:
    for x, right in zip(got, (want.dk, want.dv), strict=True):
        # The second part is for rows of one key, where dp and delta cancel all but dlse.
        allowed = TOLERANCE * np.linalg.norm(right) + 3e-7 * torch.linalg.norm(dout)
        assert np.linalg.norm(x.numpy() - right) <= allowed


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_oracle(case, config, rng):
    if config.rows > case.block_m:
        pytest.skip("a tile of queries is a block of them at most")
    inputs, settings = case.inputs(rng), case.kernel_settings()
    want = expected(inputs, **settings)
    check(gradients(inputs, want, config, **settings), want, inputs.dout)


def test_strided_queries_and_gradients(rng):
    case = dataclasses.replace(BASE, batch=2, is_causal=True)
    inputs, settings = case.inputs(rng), case.kernel_settings()
    want = expected(inputs, **settings)
    views = inputs._replace(q=strided(inputs.q), dout=strided(inputs.dout))
    launch = mock.Mock(wraps=kernels.launch_key_gradient_hopper)
    with mock.patch.object(kernels, "launch_key_gradient_hopper", launch):
        check(gradients(views, want, CONFIGS[1], **settings), want, inputs.dout)
    # Copied where copies could not start at their rows, and once for all levels.
    first, *others = [(call.args[0], call.args[2]) for call in launch.call_args_list]
    assert all(step % 16 == 0 for x in first for step in x.stride()[:3])
    assert len(others) == 2 and all(q is first[0] and dout is first[1] for q, dout in others)


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_level_1_copied_is_level_1_in_place(case, rng):
    inputs, settings = case.inputs(rng), case.kernel_settings()
    want = expected(inputs, **settings)
    in_place = gradients(inputs, want, CONFIGS[1], **settings)
    copied = gradients(inputs, want, CONFIGS[1], **settings, rows=rows_copied)
    assert all(map(torch.equal, in_place, copied))


@pytest.mark.parametrize("case", CASES[:5], ids=str)
def test_plain_kernels_read_level_1_in_place_too(case, rng):
    inputs, settings = case.inputs(rng), case.kernel_settings()
    want = expected(inputs, **settings)
    plain = KeyGradConfig(keys=16, rows=64, warps=4, stages=1)
    check(gradients(inputs, want, plain, **settings), want, inputs.dout)


@pytest.mark.parametrize("config", CONFIGS[::2], ids=str)
@pytest.mark.parametrize("deaf", ["q_full", "dout_full", "empty"])
def test_a_missing_wait_is_noticed(deaf, config, rng):
    """Without one of its waits the kernel gives a wrong answer or never ends."""
    case = dataclasses.replace(BASE, heads=1, q_len=1000, kv_len=128, level=1)
    inputs, settings = case.inputs(rng), case.kernel_settings()
    want = expected(inputs, **settings)
    place = ["q_full", "dout_full", "empty"].index(deaf)
    with (
        pytest.raises((AssertionError, TimeoutError)),
        gluon_interpreter.deaf_barrier(place, of_copies=deaf.endswith("full")),
    ):
        got = gradients(inputs, want, config, coarsest=0, **settings)
        check(got, want, inputs.dout)


@pytest.mark.parametrize(
    ("change", "config", "named"),
    [
        ({"head_dim": 32}, CONFIGS[0], "head dimension"),
        ({"block_m": 64}, CONFIGS[2], "block_m"),
        ({"block_n": 32}, CONFIGS[0], "rows of a key block"),
    ],
    ids=str,
)
def test_what_the_kernel_cannot_do_is_refused(change, config, named, rng):
    case = dataclasses.replace(BASE, **change)
    inputs, settings = case.inputs(rng), case.kernel_settings()
    want = expected(inputs, **settings)
    with pytest.raises(ValueError, match=named):
        gradients(inputs, want, config, shortest=8, **settings)


@pytest.mark.parametrize("g", range(3))
@pytest.mark.parametrize("case", [c for c in CASES if c.batch == 1], ids=str)
def test_units_list_what_any_of_their_blocks_sees(case, g, rng):
    if case.block_n >> g < LEAST_RUN:
        pytest.skip("such a level has no units")
    levels = case.levels(rng)
    geometry = Geometry(case.q_len, case.kv_len, case.block_m, case.block_n, case.is_causal)
    entries, counts = build_units(levels, geometry, g=g)
    blocks = max(1, UNIT_ROWS // (case.block_n >> g))
    _, heads, q_blocks, k_blocks = levels.shape
    assert counts.shape[2] == -(-k_blocks // blocks)
    offset = case.kv_len - case.q_len
    for h in range(heads):
        for unit in range(counts.shape[2]):
            want = []
            for i in range(q_blocks):
                bits = masked = 0
                top = min((i + 1) * case.block_m, case.q_len) - 1 + offset
                for r, j in enumerate(range(unit * blocks, min((unit + 1) * blocks, k_blocks))):
                    first = j * case.block_n
                    last = min(first + case.block_n, case.kv_len) - 1
                    seen = not case.is_causal or first <= top
                    if levels[0, h, i, j] == LEVELS[g] and seen:
                        bits |= 1 << r
                        if case.is_causal and last > i * case.block_m + offset:
                            masked = MASKED.value
                if bits:
                    want.append(i << LOG_ENTRY.value | masked | bits)
            count = int(counts[0, h, unit])
            assert entries[0, h, unit, :count].tolist() == want
