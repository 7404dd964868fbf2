"""`rest="mean"`: blocks of level 0 are seen through their means, on every implementation."""

import contextlib
import dataclasses

import numpy as np
import pytest
import torch
from torch.autograd.gradcheck import gradcheck

from psa_torch import psa_attention, sparse_attention
from psa_torch._dispatch import forced_kernels
from psa_torch.attention.rest import plain
from psa_torch.attention.rest.means import Call, block_means
from psa_torch.video import PSAVideoAttention, VideoState, head_density
from shared_specs import PSAConfig
from shared_specs import attention as oracle
from shared_specs.masks import density
from shared_specs.selection import candidate_blocks
from tests.torch.attention_contract import (
    Case,
    Inputs,
    assert_close,
    expected,
    plain_attention,
    relative_errors,
    run,
    to_numpy,
)

TOLERANCE = 2e-6
MEAN = {"rest": "mean"}
CASES = [
    Case(),
    Case(level=0),
    Case(level=1),
    Case(level="empty", q_len=77, kv_len=300, heads=4, kv_heads=2, is_causal=True, block_n=32),
    Case(level=0, q_len=300, kv_len=77, is_causal=True, batch=1),
    Case(level=0, q_len=130, kv_len=1, head_dim=24),
    Case(q_len=130, head_dim=24, value_dim=40, heads=4, is_causal=True),
    Case(block_m=128, block_n=128, q_len=333, kv_len=257, heads=3, kv_heads=1, scale=-1.5),
    Case(level="empty", is_causal=True, q_len=200, kv_len=201, scale=0.37, head_dim=64),
]


@pytest.fixture(params=["plain", "kernels"])
def passes(request):
    """The passes over the means in plain torch, and as Triton kernels."""
    with forced_kernels() if request.param == "kernels" else contextlib.nullcontext():
        yield request.param


@pytest.mark.parametrize("case", CASES, ids=str)
def test_oracle(case, passes, rng, poisoned_memory):
    inputs = case.inputs(rng)
    got = run(inputs, "gather", **case.settings(), **MEAN)
    assert_close(got, expected(inputs, **case.settings(), **MEAN), TOLERANCE)


def test_on_the_triton_implementation(rng, poisoned_memory):
    case = Case(batch=1, heads=4, kv_heads=2, level="empty", is_causal=True)
    inputs = case.inputs(rng)
    with forced_kernels():
        got = run(inputs, "triton", **case.settings(), **MEAN)
    assert_close(got, expected(inputs, **case.settings(), **MEAN), TOLERANCE)


def test_non_contiguous(passes, rng):
    case = Case(heads=4, kv_heads=2)
    inputs = case.inputs(rng)
    views = Inputs(*(x.mT.contiguous().mT if x.ndim == 4 else x for x in inputs[:3]), *inputs[3:])
    got = run(views, "gather", **case.settings(), **MEAN)
    assert_close(got, expected(inputs, **case.settings(), **MEAN), TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_is_within_twice_the_plain_error(dtype, passes, rng):
    case = Case(dtype=dtype, q_len=256, kv_len=256)
    inputs = case.inputs(rng)
    errors = relative_errors(
        run(inputs, "gather", **case.settings(), **MEAN),
        expected(inputs, **case.settings(), **MEAN),
    )
    whole = inputs._replace(levels=torch.where(inputs.levels == 0, 8, inputs.levels))
    yardstick = relative_errors(
        plain_attention(whole, **case.settings()), expected(whole, **case.settings())
    )
    assert all(errors[name] <= 2 * yardstick[name] for name in errors), (errors, yardstick)


def test_same_bits_on_every_run(passes, rng):
    case = Case(heads=4, kv_heads=1, q_len=300, kv_len=300)
    inputs = case.inputs(rng)
    first, again = (run(inputs, "gather", **case.settings(), **MEAN) for _ in range(2))
    for x, y in zip(first, again, strict=True):
        np.testing.assert_array_equal(x, y)


def test_chunks_of_rows_do_not_show(rng, monkeypatch):
    case = Case(q_len=500, heads=4, kv_heads=2, is_causal=True)
    inputs = case.inputs(rng)
    first = run(inputs, "gather", **case.settings(), **MEAN)
    monkeypatch.setattr(plain, "_ELEMENTS", 1)
    assert_close(run(inputs, "gather", **case.settings(), **MEAN), first, 1e-6)


@pytest.mark.parametrize(
    "fault", ["no bias", "means of listed blocks too", "counts of whole blocks"]
)
def test_broken_variants_are_caught(fault, rng, monkeypatch):
    if fault == "no bias":
        monkeypatch.setattr(
            plain, "block_counts", lambda n, size, device: torch.ones(-(-n // size))
        )
    elif fault == "counts of whole blocks":
        monkeypatch.setattr(
            plain, "block_counts", lambda n, size, device: torch.full((-(-n // size),), size)
        )
    else:
        of_all = plain.add_means
        monkeypatch.setattr(
            plain, "add_means", lambda q, k, v, levels, *x: of_all(q, k, v, 0 * levels, *x)
        )
    case = Case()
    inputs = case.inputs(rng)
    got = run(inputs, "gather", **case.settings(), **MEAN)
    errors = relative_errors(got, expected(inputs, **case.settings(), **MEAN))
    assert errors["out"] > 100 * TOLERANCE


def test_means_are_of_real_keys(rng):
    """The means are those of the real keys, and the count of a ragged block is its own."""
    x = torch.from_numpy(rng.normal(size=(1, 2, 70, 8)))
    means = block_means(x, 32)
    np.testing.assert_allclose(means[:, :, 2], x[:, :, 64:].mean(2), rtol=1e-12)
    assert Call(70, 70, 64, 32, False, 1.0).offset == 0


@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients_in_both_modes(is_causal, rng):
    case = Case(
        q_len=70, kv_len=80, head_dim=8, batch=1, block_n=32, heads=2, kv_heads=1,
        level="empty", is_causal=is_causal, dtype=torch.float64,
    )  # fmt: skip
    inputs = case.inputs(rng)

    def attend(*leaves):
        out, lse = sparse_attention(
            *leaves, inputs.levels, return_lse=True, **case.settings(), **MEAN
        )
        return out, lse.masked_fill(lse == -torch.inf, 0)

    leaves = tuple(x.requires_grad_() for x in inputs[:3])
    assert gradcheck(attend, leaves, fast_mode=True, check_forward_ad=False)
    tangents = tuple(torch.from_numpy(rng.normal(size=x.shape)) for x in leaves)
    moved = torch.func.jvp(attend, leaves, tangents)[1]
    step = 1e-6
    ahead, behind = (
        attend(*(x + sign * step * t for x, t in zip(leaves, tangents, strict=True)))
        for sign in (1, -1)
    )
    for tangent, x, y in zip(moved, ahead, behind, strict=True):
        torch.testing.assert_close(tangent, (x - y) / (2 * step), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "fields",
    [
        {"causal": True},
        {"mask_mode": "budget", "importance": "defect", "budget": 0.1},
        {"rearrange_method": "Gilbert", "grid": (3, 10, 10)},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_whole_call(fields, rng):
    """Chosen levels, and the field that goes with them."""
    config = PSAConfig(block_m=64, block_n=32, rest="mean", **fields)
    q, k, v = (torch.from_numpy(rng.normal(size=(1, 2, 300, 16))) for _ in range(3))
    out, lse, levels = psa_attention(q, k, v, config=config, return_lse=True, return_levels=True)
    skipped = psa_attention(q, k, v, config=config, rest="skip", levels=levels)
    if config.rearrange_method is None:
        want = oracle.sparse_attention(
            *(to_numpy(x) for x in (q, k, v)), levels.numpy(), block_m=64, block_n=32,
            is_causal=config.causal, rest="mean",
        )  # fmt: skip
        np.testing.assert_allclose(out, want, atol=1e-12)
    again = psa_attention(q, k, v, config=config, levels=levels, return_lse=True)
    torch.testing.assert_close(again, (out, lse), rtol=0, atol=0)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=config.causal)
    assert (out - dense).norm() < (skipped - dense).norm()


def test_budget_counts_a_mean(rng):
    """A mean is one key: with a budget of little more than the means nothing else is affordable."""
    config = PSAConfig(
        block_m=64, block_n=64, mask_mode="budget", importance="defect", budget=1 / 64, rest="mean"
    )
    q, k, v = (torch.from_numpy(rng.normal(size=(1, 1, 640, 16))) for _ in range(3))
    levels = psa_attention(q, k, v, config=config, return_levels=True)[1]
    skipped = psa_attention(
        q, k, v, config=dataclasses.replace(config, rest="skip"), return_levels=True
    )[1]
    assert _listed(levels) < _listed(skipped)


def _listed(segments):
    from psa_torch.masks import from_segments

    return int((from_segments(segments) > 0).sum())


def test_compiled(rng):
    config = PSAConfig(block_m=64, block_n=32, rest="mean", causal=True)
    q, k, v = (torch.from_numpy(rng.normal(size=(1, 2, 200, 16))).requires_grad_() for _ in "qkv")
    call = torch.compile(
        lambda q, k, v: psa_attention(q, k, v, config=config), fullgraph=True, backend="aot_eager"
    )
    out, want = call(q, k, v), psa_attention(q, k, v, config=config)
    torch.testing.assert_close(out, want, rtol=0, atol=0)
    for x, y in zip(*(torch.autograd.grad(z.sum(), (q, k, v)) for z in (out, want)), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_vmap(rng):
    config = PSAConfig(block_m=64, block_n=32, rest="mean")
    q, k, v = (torch.from_numpy(rng.normal(size=(3, 1, 2, 100, 16))) for _ in "qkv")
    got = torch.vmap(lambda q, k, v: psa_attention(q, k, v, config=config))(q, k, v)
    want = torch.stack([psa_attention(*x, config=config) for x in zip(q, k, v, strict=True)])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("causal", [False, True])
def test_density_counts_means(causal, rng):
    config = PSAConfig(block_m=64, block_n=32, rest="mean", causal=causal)
    q, k, v = (torch.from_numpy(rng.normal(size=(2, 3, 300, 16))).float() for _ in "qkv")
    levels = psa_attention(q, k, v, config=config, attn_impl="new_mask_type", return_levels=True)[1]
    from psa_torch.masks import from_segments

    dense = from_segments(levels)
    candidates = candidate_blocks(300, 300, config)
    got = head_density(dense, 300, 300, config)
    for head in range(3):
        want = density(dense[:, head].numpy(), candidates=candidates, rest_share=config.rest_share)
        assert abs(got[head].item() - want) < 1e-6
    state = VideoState()
    layer = PSAVideoAttention(config, layer="a", state=state)
    out = layer(q, k, v)
    torch.testing.assert_close(out, psa_attention(q, k, v, config=config))
    assert abs(np.mean([r.density for r in state.records.read()]) - got.mean().item()) < 1e-6


@pytest.mark.parametrize("rest", ["sum", None, 1])
def test_refused(rest, rng):
    q = torch.from_numpy(rng.normal(size=(1, 1, 64, 16)))
    with pytest.raises(ValueError, match="rest must be"):
        psa_attention(q, q, q, rest=rest)
    levels = torch.ones(1, 1, 1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="rest must be"):
        sparse_attention(q, q, q, levels, block_m=64, block_n=64, rest=rest)
