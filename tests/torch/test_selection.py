"""psa_torch.selection against the NumPy specification, integer by integer."""

import itertools

import numpy as np
import pytest
import torch

from psa_torch.selection import select_levels
from shared_specs import PSAConfig
from shared_specs.selection import select_levels as spec_levels

BOTH_MODES = pytest.mark.parametrize("mode", ["topk", "thresholdbound"])


def make_scores(rng, shape, kind):
    """Score rows of every kind that selection must rank the same way everywhere."""
    smooth = rng.random(shape).astype(np.float32)
    if kind == "peaked":
        return smooth**20
    if kind == "ties":
        return rng.integers(0, 3, shape).astype(np.float32) / 4
    if kind == "zeros":
        return np.zeros(shape, np.float32)
    if kind == "negative zeros":
        return np.where(rng.random(shape) < 0.5, np.float32(-0.0), smooth).astype(np.float32)
    if kind == "nan":
        return np.where(rng.random(shape) < 0.3, np.float32(np.nan), smooth).astype(np.float32)
    if kind == "nan before zeros":
        return np.where(np.arange(shape[-1]) % 2, 0.0, np.full(shape, np.nan)).astype(np.float32)
    if kind == "all nan":
        return np.full(shape, np.nan, np.float32)
    if kind == "powers of two":
        return np.ldexp(np.float32(1), -rng.integers(0, 40, shape)).astype(np.float32)
    if kind == "subnormal":
        return (smooth * 1e-40).astype(np.float32)
    if kind == "wide":
        return np.exp(rng.uniform(-80, 80, shape)).astype(np.float32)
    return smooth


KINDS = [
    *("smooth", "peaked", "ties", "zeros", "negative zeros", "nan", "all nan"),
    "nan before zeros",
    *("powers of two", "subnormal", "wide"),
]


def check(scores, config, q_len, kv_len, cap=None):
    want = spec_levels(scores, config, q_len=q_len, kv_len=kv_len, cap=cap)
    got = select_levels(
        torch.from_numpy(scores),
        config,
        q_len=q_len,
        kv_len=kv_len,
        cap=None if cap is None else torch.from_numpy(cap),
    )
    assert got.dtype == torch.int32 and got.is_contiguous()
    np.testing.assert_array_equal(got.numpy(), want)
    return want


def blocks(length, block):
    return -(-length // block)


@BOTH_MODES
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_k", [1, 2, 5, 33, 200])
def test_every_kind_of_scores(mode, kind, n_k, rng):
    config = PSAConfig(mask_mode=mode)
    check(make_scores(rng, (2, 3, 4, n_k), kind), config, 4 * 128 - 5, n_k * 64 - 7)


@BOTH_MODES
@pytest.mark.parametrize("block_n", [32, 64, 128])
def test_every_merge_factor(mode, block_n, rng):
    seen = set()
    for tile_n in (8, 16, 32, 64, 128):
        if tile_n > block_n:
            continue
        config = PSAConfig(block_n=block_n, tile_n=tile_n, mask_mode=mode)
        seen |= {config.merge(level) for level in (1, 2, 4, 8)}
        for n_k in (7, 40, 131):
            check(make_scores(rng, (1, 2, 3, n_k), "smooth"), config, 300, n_k * block_n)
    assert max(seen) == 8


@BOTH_MODES
def test_random_ratios(mode, rng):
    for _ in range(60):
        order = list(rng.permutation([0, 1, 2, 4, 8])[: rng.integers(1, 6)])
        ends = np.sort(rng.random(len(order)).round(int(rng.integers(1, 4))))
        ratios, last = {}, 0.0
        for level, end in zip(order, ends, strict=True):
            ratios[int(level)] = (last, float(end))
            last = float(end)
        try:
            config = PSAConfig(mask_ratios=ratios, mask_mode=mode, min_full_ratio=0.1)
        except ValueError:  # ties among ends taken in another order
            continue
        n_k = int(rng.integers(1, 90))
        check(make_scores(rng, (1, 2, 2, n_k), "peaked"), config, 200, n_k * 64)


@BOTH_MODES
@pytest.mark.parametrize("lengths", [(300, 300), (129, 700), (700, 129), (1, 500), (500, 1)])
@pytest.mark.parametrize("blocks_mn", [(128, 64), (64, 128), (64, 32)])
def test_causal(mode, lengths, blocks_mn, rng):
    (q_len, kv_len), (block_m, block_n) = lengths, blocks_mn
    shape = (1, 2, blocks(q_len, block_m), blocks(kv_len, block_n))
    config = PSAConfig(causal=True, block_m=block_m, block_n=block_n, mask_mode=mode)
    for kind in ("smooth", "nan", "zeros"):
        check(make_scores(rng, shape, kind), config, q_len, kv_len)


@BOTH_MODES
@pytest.mark.parametrize("position", ["start", "end"])
@pytest.mark.parametrize("text_length", [1, 64, 65, 200, 5000])
@pytest.mark.parametrize("causal", [False, True])
def test_text_and_sink(mode, position, text_length, causal, rng):
    for (q_len, kv_len), sink in itertools.product([(700, 700), (300, 650)], [0, 2, 99]):
        config = PSAConfig(
            mask_mode=mode,
            text_length=text_length,
            text_position=position,
            sink_blocks=sink,
            causal=causal,
        )
        shape = (1, 2, blocks(q_len, 128), blocks(kv_len, 64))
        check(make_scores(rng, shape, "smooth"), config, q_len, kv_len)


@BOTH_MODES
@pytest.mark.parametrize("cap_heads", [1, 2, 4])
def test_cap(mode, cap_heads, rng):
    config = PSAConfig(
        attn_impl="old_mask_type",
        block_n=128,
        use_sim_mask=True,
        mask_mode=mode,
        mask_ratios={1: (0, 0.1), 2: (0.1, 0.2), 4: (0.2, 0.3), 8: (0.3, 0.8)},
    )
    cap = rng.choice(np.array([1, 2, 4, 8], np.int32), (2, cap_heads, 20))
    levels = check(make_scores(rng, (2, 4, 3, 20), "smooth"), config, 300, 2500, cap)
    assert (levels <= np.repeat(cap, 4 // cap_heads, 1)[:, :, None]).all()


@BOTH_MODES
def test_a_row_is_never_left_empty(mode, rng):
    config = PSAConfig(mask_ratios={8: (0.0, 0.01)}, mask_mode=mode)
    for kind in ("smooth", "nan", "all nan"):
        levels = check(make_scores(rng, (1, 1, 5, 10), kind), config, 640, 640)
        assert ((levels > 0).sum(-1) >= 1).all()


def test_strided_scores(rng):
    scores = torch.from_numpy(make_scores(rng, (1, 2, 9, 9), "ties"))
    config = PSAConfig(block_m=64)
    lengths = {"q_len": 576, "kv_len": 576}
    got = select_levels(scores.transpose(2, 3), config, **lengths)
    assert torch.equal(got, select_levels(scores.transpose(2, 3).contiguous(), config, **lengths))


def test_levels_carry_no_gradient(rng):
    scores = torch.rand(1, 1, 2, 4, requires_grad=True)
    levels = select_levels(scores, PSAConfig(), q_len=256, kv_len=256)
    assert not levels.requires_grad and levels.grad_fn is None


def test_refusals(rng):
    scores = torch.rand(1, 4, 2, 4)
    lengths = {"q_len": 256, "kv_len": 256}
    with pytest.raises(ValueError, match=r"scores must be \[B, H, 2, 5\] .* got \(1, 4, 2, 4\)"):
        select_levels(scores, PSAConfig(), q_len=256, kv_len=300)
    with pytest.raises(TypeError, match="scores must be float32, got float64"):
        select_levels(scores.double(), PSAConfig(), **lengths)
    with pytest.raises(ValueError, match="scores must be at least 0, got -1.0"):
        select_levels(scores - 1 - scores, PSAConfig(), **lengths)
    for wrong in (torch.ones(1, 3, 4), torch.ones(1, 4, 5), torch.ones(4, 4)):
        with pytest.raises(ValueError, match=r"cap must be \[1, Hk, 4\] with Hk a divisor of 4"):
            select_levels(scores, PSAConfig(), **lengths, cap=wrong.int())


def test_vmap(rng):
    scores = torch.from_numpy(make_scores(rng, (3, 2, 2, 4, 9), "smooth"))
    lengths = {"q_len": 500, "kv_len": 570}
    got = torch.vmap(lambda x: select_levels(x, PSAConfig(), **lengths))(scores)
    for i in range(3):
        assert torch.equal(got[i], select_levels(scores[i], PSAConfig(), **lengths))


def test_opcheck():
    arguments = (torch.rand(1, 2, 2, 5), None, 200, 300, PSAConfig().to_json())
    torch.library.opcheck(torch.ops.psa.select_levels.default, arguments)
