"""What PSAVideoAttention remembers: between branches of guidance, and under jax.checkpoint."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax import psa_attention
from psa_jax.video import PSAVideoAttention, density_records
from shared_specs import PSAConfig
from tests.jax.attention_contract import QUICK

GRID, LENGTH = (3, 8, 8), 192


def config_of(method):
    return PSAConfig(rearrange_method=method, grid=GRID)


def make_qkv(rng, heads=1):
    return [jnp.asarray(rng.normal(size=(1, heads, LENGTH, 8)), jnp.float32) for _ in range(3)]


def stepper(module, branch):
    return jax.jit(
        lambda state, step, *qkv: module.apply(
            state, *qkv, step=step, branch=branch, mutable=["psa"]
        ),
        compiler_options=QUICK,
    )


def test_branches_of_guidance_do_not_meet(rng):
    inputs = [dict(zip("pn", (make_qkv(rng), make_qkv(rng)), strict=True)) for _ in range(3)]
    module = PSAVideoAttention(config_of("SemanticAware"), record_steps=3)
    names = {"p": "", "n": "negative"}
    call = {branch: stepper(module, name) for branch, name in names.items()}

    def run(branches):
        state, outputs = {}, {}
        for step, of_branch in enumerate(inputs):
            for branch in branches:
                outputs[step, branch], new = call[branch](state, step, *of_branch[branch])
                state = new
        return outputs, state

    together, state = run("pn")
    for branches in ("np", "p", "n"):
        for key, out in run(branches)[0].items():
            np.testing.assert_array_equal(together[key], out)
    records = density_records(state)
    assert len(records) == 2 * 3 and {record.layer for record in records} == {""}
    assert int(state["psa"]["centroids_step[negative]"]) == 2


def test_two_calls_of_one_step_start_from_the_step_before(rng):
    module = PSAVideoAttention(config_of("SemanticAware"))
    call = stepper(module, "")
    first, a, b = (make_qkv(rng) for _ in range(3))
    before = call({}, 0, *first)[1]
    alone, _ = call(before, 1, *b)
    after_another, state = call(call(before, 1, *a)[1], 1, *b)
    np.testing.assert_array_equal(after_another, alone)
    # The next step starts from the latest of them, and an earlier one starts cold.
    cold = call({}, 0, *b)[0]
    assert np.abs(call(state, 2, *b)[0] - cold).max() > 1e-4
    np.testing.assert_array_equal(call(state, 0, *b)[0], cold)


def test_a_warm_up_step_opens_a_run_for_every_branch(rng):
    module = PSAVideoAttention(config_of("SemanticAware"), warmup_steps=1)
    plain, negative = stepper(module, ""), stepper(module, "negative")
    qkv, other = make_qkv(rng), make_qkv(rng)
    state = negative(plain({}, 1, *other)[1], 1, *other)[1]
    state = plain(state, 0, *qkv)[1]
    for call in (plain, negative):
        np.testing.assert_array_equal(call(state, 2, *qkv)[0], call({}, 2, *qkv)[0])


def test_a_branch_that_is_no_string_is_refused(rng):
    with pytest.raises(TypeError, match="branch must be a string, got 1"):
        PSAVideoAttention().apply({}, *make_qkv(rng), step=0, branch=1)


class Layer(nn.Module):
    """A layer with weights around the attention."""

    method: str | None

    @nn.compact
    def __call__(self, x, step):
        weights = self.param("weights", nn.initializers.normal(0.5), (3, 8, 8))
        q, k, v = (x @ w for w in weights)
        attend = PSAVideoAttention(config_of(self.method), record_steps=4)
        return x + attend(q, k, v, step=step)


@pytest.mark.parametrize(
    ("method", "kind"),
    [("SemanticAware", "jax.checkpoint"), ("SemanticAware", "nn.remat"), ("Hybrid", "nn.remat")],
)
def test_a_checkpoint_changes_neither_gradients_nor_records(rng, method, kind):
    inputs = [make_qkv(rng)[0] for _ in range(3)]
    variables = Layer(method).init(jax.random.key(int(rng.integers(1 << 30))), inputs[0], 0)
    params = variables["params"]

    def run(wrapped):
        model = (nn.remat(Layer) if wrapped and kind == "nn.remat" else Layer)(method)

        def apply(params, state, step, x):
            return model.apply({"params": params, **state}, x, step, mutable=["psa"])

        if wrapped and kind == "jax.checkpoint":
            apply = jax.checkpoint(apply)

        def loss(params, state, step, x):
            out, state = apply(params, state, step, x)
            return (out**2).sum(), state

        step_of = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)
        grads, state = [], {}
        for step, x in enumerate(inputs):
            (_, state), grad = step_of(params, state, step, x)
            grads.append(grad["weights"])
        return grads, state

    (wanted, plain), (found, checkpointed) = run(False), run(True)
    for x, y in zip(found, wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * float(jnp.abs(y).max()))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), checkpointed, plain)
    assert len(density_records(checkpointed)) == 3


def test_a_checkpoint_of_plain_attention(rng):
    qkv = make_qkv(rng)

    def loss(attend):
        return jax.jit(
            jax.grad(lambda *x: (attend(*x) ** 2).sum(), (0, 1, 2)), compiler_options=QUICK
        )

    def attend(q, k, v):
        return psa_attention(q, k, v, config=config_of("Hybrid"))

    for x, y in zip(loss(jax.checkpoint(attend))(*qkv), loss(attend)(*qkv), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6)
