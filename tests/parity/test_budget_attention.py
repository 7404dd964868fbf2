"""`mask_mode='budget'` from q, k and v to the output, in both frameworks, against NumPy."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import psa_jax
import psa_torch
from psa_jax.importance import block_scores as jax_scores
from psa_jax.kernels.scores import unsupported
from psa_jax.selection import select_levels as jax_levels
from psa_torch import _dispatch
from psa_torch.importance import block_scores as torch_scores
from psa_torch.selection import select_levels as torch_levels
from shared_specs import PSAConfig
from shared_specs.attention import sparse_attention
from shared_specs.importance import block_scores
from shared_specs.masks import density, to_segments
from shared_specs.selection import candidate_blocks, select_levels

BUDGET = PSAConfig(importance="defect", mask_mode="budget", budget=0.15)
SMALL = dataclasses.replace(BUDGET, block_m=64, block_n=32, tile_n=16, budget=0.3)
CASES = {
    "default": (BUDGET, 300, 700),
    "row": (dataclasses.replace(SMALL, budget_scope="row"), 200, 345),
    "causal": (dataclasses.replace(SMALL, causal=True), 333, 333),
    "causal row": (dataclasses.replace(SMALL, causal=True, budget_scope="row"), 129, 400),
    "text and sink": (dataclasses.replace(SMALL, text_length=40, sink_blocks=2), 257, 611),
    "text first": (
        dataclasses.replace(SMALL, text_length=9, text_position="start", causal=True),
        257,
        257,
    ),
    "two levels": (dataclasses.replace(SMALL, budget_levels=(1, 4), sample_m=8), 70, 500),
    # Rows whose queries all stand before the first key.
    "unseen": (dataclasses.replace(SMALL, causal=True), 230, 100),
}


def inputs(rng, q_len: int, kv_len: int) -> list[np.ndarray]:
    """Two query heads to a key head; some stretches of keys are alike, others are not."""
    shapes = (4, q_len), (2, kv_len), (2, kv_len)
    q, k, v = (rng.standard_normal((2, h, n, 16), np.float32) for h, n in shapes)
    smooth = np.cumsum(k, 2) / np.sqrt(np.arange(1, kv_len + 1, dtype=np.float32))[:, None]
    k = np.where(np.arange(kv_len)[:, None] % 192 < 128, smooth, k)
    return [q, k.astype(np.float32), v]


def in_torch(q, k, v, config, **call):
    tensors = map(torch.from_numpy, (q, k, v))
    return [x.numpy() for x in psa_torch.psa_attention(*tensors, config=config, **call)]


def in_jax(q, k, v, config, **call):
    return [
        np.asarray(x)
        for x in psa_jax.psa_attention(*map(jnp.asarray, (q, k, v)), config=config, **call)
    ]


HOUSES = {
    "torch": (in_torch, lambda q, k, c: torch_scores(*map(torch.from_numpy, (q, k)), c).numpy()),
    "jax": (in_jax, lambda q, k, c: np.asarray(jax_scores(jnp.asarray(q), jnp.asarray(k), c))),
}


@pytest.mark.parametrize(
    "house, case",
    [("torch", case) for case in CASES]
    # A compilation each; selection is held to NumPy in every case below.
    + [("jax", case) for case in ("default", "causal row", "text and sink", "unseen")],
)
def test_from_inputs_to_output(house, case, rng):
    config, q_len, kv_len = CASES[case]
    q, k, v = inputs(rng, q_len, kv_len)
    attend, score = HOUSES[house]
    scores, exact = score(q, k, config), block_scores(q, k, config)
    assert scores.dtype == np.float32
    assert scores.shape == exact.shape == (2, 4, *scores.shape[2:4], 4)
    np.testing.assert_allclose(scores, exact, rtol=1e-3, atol=1e-9)
    lengths = {"q_len": q_len, "kv_len": kv_len}
    levels = select_levels(scores, config, **lengths)
    # Rounding may turn a block over where two levels cost about the same.
    assert (levels != select_levels(exact, config, **lengths)).mean() < 0.02
    out, lse, segments = attend(q, k, v, config, return_lse=True, return_levels=True)
    np.testing.assert_array_equal(segments, to_segments(levels, scores[..., 3]))
    blocks = {"block_m": config.block_m, "block_n": config.block_n, "is_causal": config.causal}
    expected = sparse_attention(q, k, v, levels, **blocks, return_lse=True)
    np.testing.assert_allclose(out, expected[0], rtol=1e-4, atol=2e-6)
    np.testing.assert_allclose(lse, expected[1], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("case", CASES)
def test_levels_are_what_was_asked_for(case, rng):
    """Not by the rule's own code: costs, permitted levels, forced blocks, no empty row."""
    config, q_len, kv_len = CASES[case]
    q, k, _ = inputs(rng, q_len, kv_len)
    scores = block_scores(q, k, config)
    levels = select_levels(scores, config, q_len=q_len, kv_len=kv_len)
    assert set(np.unique(levels)) <= {0, *config.budget_levels}
    assert (levels > 0).any(-1).all()
    offset = kv_len - q_len if config.causal else 0
    seen, forced = np.zeros((2, *levels.shape[2:]), bool)
    for i, j in np.ndindex(seen.shape):
        rows = np.arange(i * config.block_m, min((i + 1) * config.block_m, q_len)) + offset
        keys = np.arange(j * config.block_n, min((j + 1) * config.block_n, kv_len))
        sight = keys <= rows[:, None] if config.causal else np.ones((1, 1), bool)
        seen[i, j] = sight.any()
        text = range(config.text_length)
        if config.text_position == "end":
            text = range(kv_len - config.text_length, kv_len)
        texts = bool(set(text) & set(keys.tolist()))
        if config.causal or q_len == kv_len or config.text_position == "start":
            texts |= bool(set(text) & set(rows.tolist()))
        else:
            texts |= bool(config.text_length) and rows[-1] >= q_len - config.text_length
        partly = (sight.any(1) & ~sight.all(1)).any() if config.causal else False
        forced[i, j] = seen[i, j] and (texts or j < config.sink_blocks or partly)
    assert (levels[:, :, forced] == 1).all()
    hidden = ~seen & seen.any(-1, keepdims=True)
    assert (levels[:, :, hidden] == 0).all()
    axes = -1 if config.budget_scope == "row" else (-2, -1)
    cost = np.where(levels > 0, config.block_n / np.maximum(levels, 1), 0)
    allowed = config.budget * config.block_n * seen.sum(axes)
    free = (cost * (seen & ~forced)).sum(axes)
    fixed = config.block_n * forced.sum(axes)
    # Rule 5 comes after the budget, one block for each row that would stay empty.
    filled = config.block_n * ((levels > 0).sum(-1) == 1)
    filled = filled if axes == -1 else filled.sum(-1)
    assert (free <= np.maximum(allowed - fixed, 0) + filled).all()
    if case == "default":
        assert len(np.unique(levels)) >= 4, "a case that a coarser rule could pass"
        share = density(levels, candidates=candidate_blocks(q_len, kv_len, config))
        assert 0.12 < share <= 0.15


def everywhere(scores, config, **lengths) -> list[np.ndarray]:
    return [
        select_levels(scores, config, **lengths),
        torch_levels(torch.from_numpy(scores), config, **lengths).numpy(),
        np.asarray(jax_levels(jnp.asarray(scores), config, **lengths)),
    ]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["ties", "zeros", "nan"])
def test_same_levels_in_every_house(case, kind, rng):
    config, q_len, kv_len = CASES[case]
    shape = (1, 2, -(-q_len // config.block_m), -(-kv_len // config.block_n), 4)
    scores = np.sort(rng.random(shape, np.float32), -1)
    if kind == "ties":
        scores = np.floor(scores * 4) / np.float32(4)
    if kind == "zeros":
        scores[:, :, ::2] = 0
    if kind == "nan":
        scores[rng.random(shape) < 0.3] = np.nan
    expected, *others = everywhere(scores, config, q_len=q_len, kv_len=kv_len)
    for found in others:
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("scope", ["head", "row"])
def test_a_row_without_a_level_gets_the_block_of_largest_rest(scope, rng):
    config = dataclasses.replace(SMALL, budget=1e-6, budget_scope=scope)
    scores = np.floor(rng.random((1, 3, 4, 9, 4), np.float32) * 4) / np.float32(4)
    expected = np.zeros((1, 3, 4, 9), np.int32)
    largest = scores[..., 3].argmax(-1)  # the first of equals
    np.put_along_axis(expected, largest[..., None], 1, -1)
    for found in everywhere(scores, config, q_len=256, kv_len=288):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda x: x[..., 0], "mask_mode='budget'"),
        (lambda x: -x, "at least 0"),
        (lambda x: np.where(x > 0.9, np.float32(np.inf), x), "finite"),
    ],
)
@pytest.mark.parametrize("select", [0, 1, 2])
def test_defects_that_are_none_are_refused(change, said, select, rng):
    scores = change(rng.random((1, 2, 4, 9, 4), np.float32))
    call = [
        select_levels,
        lambda x, *a, **b: torch_levels(torch.from_numpy(np.ascontiguousarray(x)), *a, **b),
        lambda x, *a, **b: jax_levels(jnp.asarray(x), *a, **b),
    ][select]
    with pytest.raises(ValueError, match=said):
        call(scores, SMALL, q_len=256, kv_len=288)


@pytest.mark.parametrize("house", HOUSES)
def test_costs_past_int32_are_refused_before_any_work(house, monkeypatch):
    package = {"torch": psa_torch, "jax": psa_jax}[house]
    room = {"torch": "choice", "jax": "functional"}[house]
    monkeypatch.setattr(f"{package.__name__}.{room}.block_scores", None)
    x = np.broadcast_to(np.float32(0), (1, 1, 1 << 19, 8))
    if house == "torch":
        given, run = torch.zeros(()).expand(x.shape), psa_torch.choice.choose_levels
        call = partial(run, given, given, psa_torch._config.settings_of(BUDGET, {}))
    else:
        given = jax.ShapeDtypeStruct(x.shape, np.float32)
        call = partial(psa_jax.functional.choose_levels, given, given, BUDGET)
    with pytest.raises(ValueError, match="2\\^31"):
        call()


def test_torch_transforms(rng):
    drawn = [torch.from_numpy(x) for x in inputs(rng, 130, 300)]
    run = partial(psa_torch.psa_attention, config=SMALL)
    expected, levels = run(*drawn, return_levels=True)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*drawn), expected)
    mapped = torch.vmap(run, in_dims=1)(*(x.unflatten(1, (2, -1)) for x in drawn))
    torch.testing.assert_close(mapped.transpose(0, 1).flatten(1, 2), expected)
    leaves = [x.requires_grad_() for x in drawn]
    chosen = torch.autograd.grad(run(*leaves).square().sum(), leaves)
    given = torch.autograd.grad(run(*leaves, levels=levels).square().sum(), leaves)
    for a, b in zip(chosen, given, strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b)


def test_jax_transforms(rng):
    drawn = [jnp.asarray(x) for x in inputs(rng, 130, 300)]
    run = partial(psa_jax.psa_attention, config=SMALL)
    expected, levels = run(*drawn, return_levels=True)
    np.testing.assert_allclose(jax.jit(run)(*drawn), expected, rtol=1e-5, atol=1e-6)
    split = [x.reshape(2, 2, -1, *x.shape[2:]) for x in drawn]
    mapped = jax.vmap(run, in_axes=1, out_axes=1)(*split)
    np.testing.assert_allclose(mapped.reshape(expected.shape), expected, rtol=1e-5, atol=1e-6)

    def loss(given, q, k, v):
        return jnp.square(run(q, k, v, levels=given)).sum()

    chosen = jax.grad(partial(loss, None), (0, 1, 2))(*drawn)
    given = jax.grad(partial(loss, levels), (0, 1, 2))(*drawn)
    for a, b in zip(chosen, given, strict=True):
        assert jnp.abs(a).max() > 0
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_kernels_are_taken_where_kernels_run(rng, monkeypatch):
    """Scores by the kernel equal those of plain torch; levels are the same integers."""
    from psa_torch.kernels import budget, defect

    run = []
    for module, name in ((defect, "defect_scores"), (budget, "budget_levels")):
        kernel = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *x, kernel=kernel, **call: run.append(kernel) or kernel(*x, **call)
        )
    q, k, _ = map(torch.from_numpy, inputs(rng, 130, 300))
    expected = torch_scores(q, k, SMALL)
    levels = torch_levels(expected, SMALL, q_len=130, kv_len=300)
    assert not run
    with _dispatch.forced_kernels():
        scores = torch_scores(q, k, SMALL)
        torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-9)
        found = torch_levels(expected, SMALL, q_len=130, kv_len=300)
    assert torch.equal(found, levels) and len(run) == 2


def test_jax_says_that_its_kernels_do_not_take_defects(rng):
    q, k, _ = map(jnp.asarray, inputs(rng, 130, 300))
    coarse = jax.ShapeDtypeStruct(q.shape, jnp.bfloat16)
    assert "defect" in unsupported(coarse, coarse, SMALL)
