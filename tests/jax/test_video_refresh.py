"""PSAVideoAttention that keeps its order and levels, and whose budget has phases."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax import psa_attention, sparse_attention
from psa_jax.functional import choose_levels
from psa_jax.order import TokenOrder
from psa_jax.video import PSAVideoAttention, density_records
from shared_specs import PSAConfig

GRID, LENGTH = (3, 8, 8), 3 * 8 * 8 + 8
BLOCKS = {"block_m": 64, "block_n": 32}
RATIOS = {1: (0.0, 0.3), 4: (0.3, 0.6)}


def config_of(method):
    return PSAConfig(
        rearrange_method=method, grid=GRID, text_length=8, mask_ratios=RATIOS, **BLOCKS
    )


def make_qkv(rng):
    return [jnp.asarray(rng.normal(size=(1, heads, LENGTH, 8)), jnp.float32) for heads in (2, 1, 1)]


@functools.partial(jax.jit, static_argnames="config")
def by_hand(chosen_by, qkv, centroids, *, config):
    """Attention of `qkv` with the order and levels of `chosen_by`; the centroids it left."""
    order = TokenOrder.from_config(config, LENGTH, LENGTH)
    q, k, _, state = order.apply(*chosen_by, centroids=centroids)
    levels = choose_levels(q, k, config).levels
    out = sparse_attention(*order.move(*qkv, state), levels, **BLOCKS)
    return order.undo(out, state), state.centroids


@pytest.mark.parametrize("method", [None, "Hybrid"])
def test_kept_steps_use_the_order_and_levels_of_the_step_that_chose(rng, method):
    config = config_of(method)
    module = PSAVideoAttention(config, warmup_steps=1, refresh_every=2)
    run = jax.jit(lambda state, step, *qkv: module.apply(state, *qkv, step=step, mutable=["psa"]))
    steps = [make_qkv(rng) for _ in range(6)]
    state, outputs = {}, []
    for step, qkv in enumerate(steps):
        out, state = run(state, step, *qkv)
        outputs.append(out)
    centroids = None
    for step in range(1, 6):
        first = step - (step + 1) % 2
        expected, left = by_hand(steps[first], steps[step], centroids, config=config)
        np.testing.assert_allclose(outputs[step], expected, atol=2e-5, rtol=0)
        if step > first:  # choosing anew would have been something else
            anew, _ = by_hand(steps[step], steps[step], centroids, config=config)
            assert np.abs(outputs[step] - anew).max() > 1e-3
            centroids = left
    # The same step again, an earlier one, and one after a warm-up step.
    again, _ = run(state, 5, *steps[5])
    np.testing.assert_allclose(again, outputs[5], atol=1e-6, rtol=0)
    cold, _ = by_hand(steps[2], steps[2], None, config=config)
    for before in (state, run(state, 0, *steps[0])[1]):
        out, _ = run(before, 2, *steps[2])
        np.testing.assert_allclose(out, cold, atol=2e-5, rtol=0)


def test_branches_and_checkpoints_keep_their_own(rng):
    module = PSAVideoAttention(config_of(None), refresh_every=3)
    steps = [(make_qkv(rng), make_qkv(rng)) for _ in range(3)]

    def run(branches, remat):
        def loss(q, state, step, k, v, branch):
            call = functools.partial(module.apply, step=step, branch=branch, mutable=["psa"])
            out, state = (jax.checkpoint(call) if remat else call)(state, q, k, v)
            return jnp.square(out).sum(), (out, state)

        advance = jax.jit(jax.grad(loss, has_aux=True), static_argnames="branch")
        state = {}
        for branch in branches:  # made beforehand, so that all steps are one program
            init = functools.partial(module.init, step=0, branch=branch)
            made = jax.eval_shape(init, jax.random.key(0), *steps[0][0])
            state |= jax.tree.map(lambda x: -jnp.ones(x.shape, x.dtype), made["psa"])
        state, found = {"psa": state}, {}
        for step, inputs in enumerate(steps):
            for branch in branches:
                q, k, v = inputs[branch == "b"]
                grad, (out, state) = advance(q, state, step, k, v, branch)
                found[step, branch] = (out, grad)
        return found

    together = run(["", "b"], remat=True)
    for key, arrays in run(["b"], remat=False).items():
        for x, y in zip(arrays, together[key], strict=True):
            np.testing.assert_allclose(x, y, atol=1e-6, rtol=0)


def test_another_shape_and_a_missing_step_are_refused(rng):
    module = PSAVideoAttention(config_of(None), refresh_every=3)
    state = jax.eval_shape(lambda *x: module.init(jax.random.key(0), *x, step=0), *make_qkv(rng))
    other = [jnp.concatenate([x, x], 1) for x in make_qkv(rng)]
    with pytest.raises(ValueError, match="levels kept from an earlier step must have shape"):
        jax.eval_shape(lambda state, *x: module.apply(state, *x, step=1), state, *other)
    with pytest.raises(ValueError, match="step must be given with refresh_every=3; got None"):
        module.apply({}, *make_qkv(rng))
    with pytest.raises(ValueError, match="refresh_every must be at least 1, got 0"):
        PSAVideoAttention(refresh_every=0).apply({}, *make_qkv(rng), step=0)
    with pytest.raises(ValueError, match="a schedule of 2 phases"):
        PSAVideoAttention(config_of(None), schedule={2: RATIOS}).apply({}, *make_qkv(rng))
    with pytest.raises(TypeError, match="schedule must be None or map"):
        PSAVideoAttention(config_of(None), schedule=3).apply({}, *make_qkv(rng), step=0)


def test_each_step_has_the_budget_of_its_phase(rng):
    config = PSAConfig(
        rearrange_method="Gilbert", grid=(3, 8, 8), text_length=8, importance="defect",
        mask_mode="budget", budget=0.7, **BLOCKS,
    )  # fmt: skip
    module = PSAVideoAttention(
        config, warmup_steps=2, schedule={3: 0.5, 5: 0.2}, refresh_every=2, record_steps=8
    )
    budgets = {2: 0.7, 3: 0.5, 5: 0.2}
    steps = [make_qkv(rng) for _ in range(6)]
    run = jax.jit(lambda state, step, *qkv: module.apply(state, *qkv, step=step, mutable=["psa"]))
    state = {}
    for step, qkv in enumerate(steps):
        out, state = run(state, step, *qkv)
        if step in budgets:
            phase = dataclasses.replace(config, budget=budgets[step])
            expected = psa_attention(*qkv, config=phase)
            np.testing.assert_allclose(out, expected, atol=2e-5, rtol=0)
    assert run._cache_size() == 2  # without a state, and with one
    # A step that is known when the program is made has the work of its phase alone.
    out = module.apply({}, *steps[4], step=4)
    expected = psa_attention(*steps[4], config=dataclasses.replace(config, budget=0.5))
    np.testing.assert_allclose(out, expected, atol=2e-5, rtol=0)
    means = {}
    for record in density_records(state):
        means.setdefault(record.step, []).append(record.density)
    means = {step: np.mean(found) for step, found in means.items()}
    assert means[0] == means[1] == 1 > means[2] > means[3] == means[4] > means[5]
