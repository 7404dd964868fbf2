"""Sequences of different lengths in a batch: each as if it stood alone (specification, 1)."""

import dataclasses

import numpy as np
import pytest
import torch

from psa_torch import PSAAttention, psa_attention, sparse_attention
from psa_torch.masks import from_segments
from shared_specs import PSAConfig
from shared_specs import attention as oracle
from tests.torch.attention_contract import Case, Inputs, Results, assert_close, run, to_numpy

LENS = torch.tensor([200, 77, 0, 1, 130]), torch.tensor([65, 300, 20, 128, 0])
CASE = Case(batch=5, heads=4, kv_heads=2, q_len=200, kv_len=300, head_dim=16, value_dim=24)
CASES = [
    CASE,
    dataclasses.replace(CASE, is_causal=True, block_n=32),
    dataclasses.replace(CASE, level="empty", block_m=128, scale=-0.7),
]


def poisoned(inputs: Inputs, q_lens, kv_lens) -> Inputs:
    """NaN past every length, and levels that are none."""
    inputs = Inputs(*(x.clone() for x in inputs))
    for b, (q_len, kv_len) in enumerate(zip(q_lens.tolist(), kv_lens.tolist(), strict=True)):
        for x, length in zip(inputs, (q_len, kv_len, kv_len, None, q_len, q_len), strict=True):
            if length is not None:
                x[b, :, length:] = torch.nan
    return inputs


def alone(inputs: Inputs, q_lens, kv_lens, call) -> Results:
    """What `call` makes of each sequence by itself, in a batch of zeros (lse -inf)."""
    shapes = inputs.dout, inputs.dlse, *inputs[:3]
    results = [np.zeros(x.shape) for x in shapes]
    results[1][:] = -np.inf
    for b, (q_len, kv_len) in enumerate(zip(q_lens.tolist(), kv_lens.tolist(), strict=True)):
        if not q_len or not kv_len:
            continue
        q, k, v, levels, dout, dlse = (x[b : b + 1] for x in inputs)
        part = Inputs(
            q[:, :, :q_len], k[:, :, :kv_len], v[:, :, :kv_len], levels, dout[:, :, :q_len],
            dlse[:, :, :q_len],
        )  # fmt: skip
        for whole, x, length in zip(
            results, call(part), (q_len, q_len, q_len, kv_len, kv_len), strict=True
        ):
            whole[b, :, :length] = x[0]
    return Results(*results)


def of_blocks(levels, q, k, case):
    rows, columns = -(-q.shape[2] // case.block_m), -(-k.shape[2] // case.block_n)
    return levels[:, :, :rows, :columns]


@pytest.mark.parametrize("rest", ["skip", "mean"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_sequence_is_as_alone(case, rest, rng):
    inputs = case.inputs(rng)
    settings = {**case.settings(), "rest": rest}
    lens = dict(zip(("q_lens", "kv_lens"), LENS, strict=True))
    got = run(poisoned(inputs, *LENS), "gather", **settings, **lens)

    def by_itself(part):
        part = part._replace(levels=of_blocks(part.levels, part.q, part.k, case))
        return run(part, "gather", **settings)

    want = alone(inputs, *LENS, by_itself)
    for name, x, y in zip(Results._fields, got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6, err_msg=name)
    # The oracle, which has a statement of its own.
    q, k, v, dout, dlse = (to_numpy(x) for x in (*inputs[:3], *inputs[4:]))
    levels, lens = inputs.levels.numpy(), {name: x.numpy() for name, x in lens.items()}
    out, lse = oracle.sparse_attention(q, k, v, levels, return_lse=True, **settings, **lens)
    grads = oracle.sparse_attention_grad(q, k, v, levels, dout, dlse=dlse, **settings, **lens)
    assert_close(got, Results(out, lse, *grads), 2e-6)


def test_on_the_triton_kernels(rng):
    case = dataclasses.replace(CASE, batch=3, heads=2, is_causal=True)
    inputs = case.inputs(rng)
    q_lens, kv_lens = torch.tensor([70, 200, 0]), torch.tensor([300, 33, 5])
    lens = {"q_lens": q_lens, "kv_lens": kv_lens}
    dirty = poisoned(inputs, q_lens, kv_lens)
    got = run(dirty, "triton", **case.settings(), **lens)
    assert_close(got, run(dirty, "gather", **case.settings(), **lens), 4e-6)


def test_only_one_of_the_two(rng):
    inputs = CASE.inputs(rng)
    whole = torch.full((5,), CASE.q_len), torch.full((5,), CASE.kv_len)
    for name, lens in (("q_lens", LENS[0]), ("kv_lens", LENS[1])):
        one = sparse_attention(*inputs[:4], **CASE.settings(), **{name: lens})
        both = {"q_lens": whole[0], "kv_lens": whole[1], name: lens}
        assert torch.equal(one, sparse_attention(*inputs[:4], **CASE.settings(), **both))
    plain = sparse_attention(*inputs[:4], **CASE.settings())
    every = sparse_attention(*inputs[:4], **CASE.settings(), q_lens=whole[0], kv_lens=whole[1])
    assert torch.equal(plain, every)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"causal": True, "importance": "sampled", "mask_mode": "thresholdbound"},
        {"text_length": 5, "sink_blocks": 1, "attn_impl": "old_mask_type", "block_n": 128},
        {"importance": "defect", "mask_mode": "budget"},
    ],
    ids=str,
)
def test_levels_are_chosen_for_each_sequence_alone(settings, rng):
    inputs = CASE.inputs(rng)
    config = PSAConfig(**settings)

    def chosen(*qkv, **lens):
        out, levels = psa_attention(*qkv, config=config, return_levels=True, **lens)
        is_dense = config.attn_impl == "old_mask_type"
        return out, levels if is_dense else from_segments(levels)

    lens = {"q_lens": LENS[0], "kv_lens": LENS[1]}
    out, levels = chosen(*poisoned(inputs, *LENS)[:3], **lens)
    for b, (q_len, kv_len) in enumerate(zip(*(x.tolist() for x in LENS), strict=True)):
        if not q_len or not kv_len:
            assert not out[b].any() and not levels[b].any()
            continue
        part = inputs.q[b : b + 1, :, :q_len], *(x[b : b + 1, :, :kv_len] for x in inputs[1:3])
        want, of_sequence = chosen(*part)
        rows, columns = of_sequence.shape[2:]
        assert torch.equal(levels[b, :, :rows, :columns], of_sequence[0])
        assert not levels[b, :, rows:].any() and not levels[b, :, :, columns:].any()
        torch.testing.assert_close(out[b, :, :q_len], want[0])
        assert not out[b, :, q_len:].any()


def test_module_and_compiler(rng):
    q, k, v = CASE.inputs(rng)[:3]
    layer = PSAAttention(PSAConfig(causal=True))
    lens = {"q_lens": LENS[0], "kv_lens": LENS[1].int()}
    want = layer(q, k, v, **lens)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = compiled(*leaves, **lens)
    assert torch.equal(out, want)
    for x in torch.autograd.grad(out.square().sum(), leaves):
        assert x.isfinite().all() and x.any()


BAD = [
    ({"q_lens": [1, 2]}, TypeError, "q_lens must be a torch.Tensor"),
    ({"q_lens": torch.ones(5)}, TypeError, "q_lens must hold integers, got float32"),
    ({"kv_lens": torch.ones(4).int()}, ValueError, r"kv_lens must be \[B\] = \(5,\), got shape"),
    ({"kv_lens": torch.tensor([1, 2, 3, 301, 5])}, ValueError, "kv_lens must be from 0 to 300"),
    ({"q_lens": torch.tensor([1, 2, 3, -1, 5])}, ValueError, "q_lens must be from 0 to 200"),
]


@pytest.mark.parametrize(("lens", "error", "message"), BAD, ids=str)
def test_lengths_that_do_not_fit(lens, error, message, rng):
    inputs = CASE.inputs(rng)
    with pytest.raises(error, match=message):
        psa_attention(*inputs[:3], **lens)
    with pytest.raises(error, match=message):
        sparse_attention(*inputs[:4], **CASE.settings(), **lens)


def test_what_is_not_there_is_refused_by_name(rng):
    inputs = CASE.inputs(rng)
    lens = {"q_lens": LENS[0]}
    with pytest.raises(ValueError, match="rearrange_method must be None where q_lens"):
        psa_attention(*inputs[:3], **lens, rearrange_method="SemanticAware")
    with pytest.raises(TypeError, match="cu_seqlens"):
        psa_attention(*inputs[:3], cu_seqlens=LENS[0])

    def loss(q):
        return sparse_attention(q, *inputs[1:4], **CASE.settings(), **lens).sum()

    with pytest.raises(NotImplementedError, match="q_lens and kv_lens are not supported inside"):
        torch.func.grad(loss)(inputs.q)
    with pytest.raises(NotImplementedError, match="q_lens and kv_lens are not supported inside"):
        torch.func.jvp(loss, (inputs.q,), (inputs.q,))
