"""psa_attention and PSAAttention: the whole call, against the oracle, and what it refuses."""

import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch

import psa_torch
from psa_torch import PSAAttention, PSAConfig, psa_attention
from psa_torch.masks import to_segments
from psa_torch.order import TokenOrder
from shared_specs.attention import sparse_attention as oracle
from shared_specs.attention import sparse_attention_grad as oracle_grad
from shared_specs.importance import block_scores as spec_scores
from shared_specs.masks import from_segments
from shared_specs.selection import select_levels as spec_levels
from shared_specs.similarity import similarity_cap as spec_cap

OLD = {"attn_impl": "old_mask_type", "block_n": 128}


def tensors(rng, q_len=300, kv_len=300, heads=4, kv_heads=2, d=32, dtype=torch.float32):
    """q, k, v that drift along the sequence, so that blocks differ in what they attend to."""

    def drifting(heads, length):
        steps = rng.standard_normal((2, heads, -(-length // 32), d)).repeat(32, 2)[:, :, :length]
        return torch.from_numpy(rng.standard_normal(steps.shape) + 1.5 * steps).to(dtype)

    return [drifting(*size) for size in ((heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len))]


CASES = {
    "default": {},
    "thresholdbound": {"mask_mode": "thresholdbound"},
    "causal": {"causal": True},
    "small blocks": {"block_m": 64, "block_n": 32, "scale": 0.3},
    "sampled": {"importance": "sampled", "sink_blocks": 1},
    "antidiagonal": {"importance": "antidiagonal", "causal": True, "mask_mode": "thresholdbound"},
    "text": {"text_length": 70, "text_position": "start"},
    "old form": OLD,
    "old form, similarity": {**OLD, "use_sim_mask": True, "mask_ratios": {8: (0, 0.9)}},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("lengths", [(300, 300), (150, 420)])
def test_equals_the_specification_end_to_end(case, lengths, rng):
    config = PSAConfig(**CASES[case])
    q, k, v = tensors(rng, *lengths)
    out, lse, levels = psa_attention(q, k, v, config=config, return_lse=True, return_levels=True)
    arrays = [x.numpy() for x in (q, k, v)]
    cap = spec_cap(arrays[1], config) if config.use_sim_mask else None
    lengths = {"q_len": q.shape[2], "kv_len": k.shape[2]}
    want = spec_levels(spec_scores(*arrays[:2], config), config, **lengths, cap=cap)
    dense = levels.numpy() if config.attn_impl == "old_mask_type" else from_segments(levels.numpy())
    assert (dense == want).mean() >= 0.999
    want_out, want_lse = oracle(
        *arrays,
        dense,
        block_m=config.block_m,
        block_n=config.block_n,
        scale=config.scale,
        is_causal=config.causal,
        return_lse=True,
    )
    np.testing.assert_allclose(out.numpy(), want_out, atol=1e-5)
    np.testing.assert_allclose(lse.numpy(), want_lse, rtol=2e-6, atol=5e-6)


def test_the_similarity_cap_reaches_the_levels(rng):
    """Thresholds that bind, on keys that drift: at the defaults every group of 8 passes."""
    q, k, v = tensors(rng, 700, 700)
    k = torch.from_numpy(rng.standard_normal(k.shape)).float().cumsum(2)
    config = PSAConfig(**OLD, mask_ratios={1: (0, 0.1), 8: (0.1, 1)})
    thresholds = {"sim_2x_threshold": 0.9, "sim_4x_threshold": 0.9, "sim_8x_threshold": 0.9}
    capped = dataclasses.replace(config, use_sim_mask=True, **thresholds)
    _, plain = psa_attention(q, k, v, config=config, return_levels=True)
    _, levels = psa_attention(q, k, v, config=capped, return_levels=True)
    scores = spec_scores(q.numpy(), k.numpy(), capped)
    cap = spec_cap(k.numpy(), capped)
    want = spec_levels(scores, capped, q_len=700, kv_len=700, cap=cap)
    assert np.array_equal(levels.numpy(), want)
    assert (levels < plain).any() and len(np.unique(cap)) > 1


def test_returned_segments_stand_by_score(rng):
    q, k, v = tensors(rng)
    _, levels = psa_attention(q, k, v, return_levels=True)
    scores = psa_torch.importance.block_scores(q, k, PSAConfig())
    dense = psa_torch.masks.from_segments(levels)
    assert torch.equal(levels, to_segments(dense, scores))
    assert not torch.equal(levels, to_segments(dense))


@pytest.mark.parametrize("form", ["dense", "segments", "int64"])
def test_levels_of_the_caller(form, rng):
    q, k, v = tensors(rng)
    dense = torch.from_numpy(rng.choice(np.array([0, 1, 2, 4, 8], np.int32), (2, 4, 3, 5)))
    levels = {"dense": dense, "segments": to_segments(dense), "int64": dense.long()}[form]
    out, returned = psa_attention(q, k, v, levels=levels, return_levels=True)
    want = oracle(*(x.numpy() for x in (q, k, v)), dense.numpy(), block_m=128, block_n=64)
    np.testing.assert_allclose(out.numpy(), want, atol=1e-5)
    assert torch.equal(returned, to_segments(dense))


def test_returned_levels_give_the_same_output(rng):
    q, k, v = tensors(rng)
    for overrides in ({}, OLD, {"rearrange_method": "Gilbert", "grid": (3, 10, 10)}):
        out, levels = psa_attention(q, k, v, return_levels=True, **overrides)
        assert torch.equal(psa_attention(q, k, v, levels=levels, **overrides), out)


def test_overrides_replace_fields(rng):
    q, k, v = tensors(rng)
    config = PSAConfig(block_m=64)
    want = psa_attention(q, k, v, config=dataclasses.replace(config, causal=True, scale=0.2))
    assert torch.equal(psa_attention(q, k, v, config=config, causal=True, scale=0.2), want)
    assert torch.equal(psa_attention(q, k, v, block_m=64, causal=True, scale=0.2), want)
    ratios = {1: (0, 1)}
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(psa_attention(q, k, v, mask_ratios=ratios), dense)


@pytest.mark.parametrize(("name", "good", "bad"), [("causal", True, 1), ("sink_blocks", 1, True)])
def test_an_override_is_not_taken_for_one_that_equals_it(name, good, bad, rng):
    """Results are kept, and True == 1."""
    q, k, v = tensors(rng)
    psa_attention(q, k, v, **{name: good})
    with pytest.raises(TypeError, match=name):
        psa_attention(q, k, v, **{name: bad})


@pytest.mark.parametrize("method", ["Gilbert", "STA", "Clusters", "SemanticAware", "Hybrid"])
@pytest.mark.parametrize("position", ["start", "end"])
def test_token_orders_are_applied_and_undone(method, position, rng):
    q, k, v = tensors(rng, 320, 320)
    fields = {"grid": (3, 10, 10), "text_length": 20, "text_position": position}
    config = PSAConfig(rearrange_method=method, **fields)
    every = {"mask_ratios": {1: (0, 1)}}
    out, lse = psa_attention(q, k, v, config=config, return_lse=True, **every)
    want, want_lse = psa_attention(q, k, v, return_lse=True, **every)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)
    order = TokenOrder.from_config(config, 320, 320)
    moved_q, moved_k, moved_v, state = order.apply(q, k, v)
    plain = psa_attention(
        moved_q, moved_k, moved_v, config=dataclasses.replace(config, rearrange_method=None)
    )
    assert torch.equal(psa_attention(q, k, v, config=config), order.undo(plain, state))


@pytest.mark.parametrize("overrides", [{}, {"rearrange_method": "Gilbert", "grid": (3, 10, 10)}])
def test_gradients(overrides, rng):
    """Those of the formula for the levels chosen, through lse too, and none through scores."""
    q, k, v = (x.requires_grad_() for x in tensors(rng))
    dout, dlse = torch.randn(q.shape), torch.randn(q.shape[:3])
    out, lse, levels = psa_attention(q, k, v, return_lse=True, return_levels=True, **overrides)
    got = torch.autograd.grad([out, lse], [q, k, v], [dout, dlse])
    arrays = [x.detach() for x in (q, k, v)]
    if overrides:
        order = TokenOrder.from_config(PSAConfig(**overrides), 300, 300)
        *arrays, state = order.apply(*arrays)
        take = torch.tensor(order.fixed_permutation().order).long()
        dout, dlse = dout[:, :, take], dlse[:, :, take]
    want = oracle_grad(
        *(x.numpy() for x in arrays),
        from_segments(levels.numpy()),
        dout.numpy(),
        block_m=128,
        block_n=64,
        dlse=dlse.numpy(),
    )
    for x, y in zip(got, want, strict=True):
        y = torch.from_numpy(y).float()
        y = order.undo(y, state) if overrides else y
        torch.testing.assert_close(x, y, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype, rng):
    q, k, v = tensors(rng, dtype=dtype)
    out, lse, levels = psa_attention(q, k, v, return_lse=True, return_levels=True)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    want = oracle(*(x.double().numpy() for x in (q, k, v)), levels.numpy(), block_m=128, block_n=64)
    tolerance = {torch.float16: 5e-3, torch.bfloat16: 4e-2, torch.float64: 1e-12}[dtype]
    np.testing.assert_allclose(out.double().numpy(), want, atol=tolerance)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 192])
@pytest.mark.parametrize("causal", [False, True])
def test_short_sequences_are_finite(length, causal, rng):
    q, k, v = tensors(rng, length, length)
    assert torch.isfinite(psa_attention(q, k, v, causal=causal)).all()


def test_queries_before_the_first_key_give_zeros(rng):
    """Causal with Lq > Lk: the first rows see nothing."""
    q, k, v = (x.requires_grad_() for x in tensors(rng, 300, 100))
    out, lse = psa_attention(q, k, v, causal=True, return_lse=True)
    assert (out[:, :, :200] == 0).all() and (lse[:, :, :200] == -torch.inf).all()
    out.sum().backward()
    assert (q.grad[:, :, :200] == 0).all() and torch.isfinite(k.grad).all()


def test_module(rng):
    q, k, v = tensors(rng)
    config = PSAConfig(causal=True, block_m=64, mask_ratios={1: (0, 0.2), 4: (0.2, 0.9)})
    module = PSAAttention(config)
    want = psa_attention(q, k, v, config=config, return_lse=True, return_levels=True)
    got = module(q, k, v, return_lse=True, return_levels=True)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    assert list(module.parameters()) == [] and module.state_dict() == {}
    assert repr(PSAAttention()) == "PSAAttention()"
    assert "causal=True" in repr(module) and "block_m=64" in repr(module)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert copied.config == config and torch.equal(copied(q, k, v), want[0])
    levels = want[2]
    assert torch.equal(module(q, k, v, levels=levels, implementation="gather"), want[0])


GOOD = {"q": (1, 4, 128, 32), "k": (1, 2, 128, 32), "v": (1, 2, 128, 32)}
REFUSED = {
    "rank": ({"q": torch.rand(4, 128, 32)}, ValueError, r"q must be \[B, H, Lq, D\], got shape"),
    "heads": ({"q": torch.rand(1, 3, 128, 32)}, ValueError, "multiple of heads of k, got 3 and 2"),
    "batch": ({"q": torch.rand(2, 4, 128, 32)}, ValueError, "k must have the batch of q, 2, got 1"),
    "head dimension": (
        {name: torch.rand(*shape[:3], 20) for name, shape in GOOD.items()},
        ValueError,
        "head dimension must be a multiple of 8 in 8..256, got 20",
    ),
    "v shape": ({"v": torch.rand(1, 2, 100, 32)}, ValueError, "v must have the shape of k"),
    "no keys": (
        {"k": torch.rand(1, 2, 0, 32), "v": torch.rand(1, 2, 0, 32)},
        ValueError,
        "k must have length of at least 1",
    ),
    "dtype": ({"q": torch.ones(1, 4, 128, 32, dtype=torch.int32)}, TypeError, "q must be float16"),
    "mixed dtypes": ({"k": torch.rand(GOOD["k"]).half()}, TypeError, "one dtype, got q float32"),
    "mixed devices": (
        {"v": torch.empty(GOOD["v"], device="meta")},
        ValueError,
        "on one device, got q cpu, k cpu, v meta",
    ),
    "not a tensor": ({"q": np.ones(GOOD["q"])}, TypeError, "q must be a torch.Tensor, got ndarray"),
    "levels shape": (
        {"levels": torch.ones(1, 4, 1, 3, dtype=torch.int32)},
        ValueError,
        r"levels must be \(1, 4, 1, 2\) \(old_mask_type\) or \(1, 4, 1, 7\)",
    ),
    "levels dtype": ({"levels": torch.ones(1, 4, 1, 2)}, TypeError, "levels must be an integer"),
    "levels value": (
        {"levels": torch.full((1, 4, 1, 2), 3)},
        ValueError,
        r"levels must be 0, 1, 2, 4 or 8, got 3 at \[0, 0, 0, 0\]",
    ),
    "segments": (
        {"levels": torch.zeros(1, 4, 1, 7, dtype=torch.int32)},
        ValueError,
        "segments row 0 must be five segments each closed by -1",
    ),
    "levels kind": ({"levels": [[1]]}, TypeError, "levels must be a torch.Tensor, got list"),
    "config": ({"config": {"causal": True}}, TypeError, "config must be a PSAConfig or None"),
    "unknown override": ({"casual": True}, TypeError, r"unknown arguments \['casual'\]"),
    "wrong override": ({"block_m": 100}, ValueError, "block_m must be one of 64, 128, got 100"),
    "implementation": (
        {"implementation": "cuda"},
        ValueError,
        "implementation must be None or one of 'triton', 'gather', got 'cuda'",
    ),
    "unable": (
        {name: torch.rand(shape).double() for name, shape in GOOD.items()}
        | {"implementation": "triton"},
        ValueError,
        "implementation 'triton' cannot run on this input",
    ),
    "flag": ({"return_lse": 1}, TypeError, "return_lse must be True or False, got 1"),
    "no grid": ({"rearrange_method": "Gilbert"}, ValueError, "grid"),
    "causal order": ({"rearrange_method": "STA", "causal": True}, ValueError, "contradictory"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    wrong, error, message = REFUSED[case]
    arguments = {name: torch.rand(shape) for name, shape in GOOD.items()} | wrong
    with pytest.raises(error, match=message):
        psa_attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


def test_module_refuses_a_wrong_config():
    with pytest.raises(TypeError, match="config must be a PSAConfig or None, got dict"):
        PSAAttention({"causal": True})
