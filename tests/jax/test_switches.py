"""JAX's switches: whatever a program sets, everything traces and gives the same result."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax import PSAConfig, PSAVideoAttention, psa_attention, sparse_attention
from psa_jax.importance import block_scores
from psa_jax.kernels.scores import peak_scores
from psa_jax.masks import from_segments, to_segments
from psa_jax.order import kmeans
from psa_jax.pyramid import build_pyramid
from psa_jax.selection import select_levels
from psa_jax.similarity import similarity_cap
from psa_jax.table import build_table
from tests.jax.attention_contract import QUICK
from tests.jax.test_mosaic_lowering import FAST, KERNELS, kernels_in, lower

BLOCKS = {"block_m": 64, "block_n": 32}
LENGTH, KEYS = 160, 100

SWITCHES = {
    "jax_enable_x64": functools.partial(jax.enable_x64, True),
    "jax_numpy_rank_promotion": functools.partial(jax.numpy_rank_promotion, "raise"),
    "jax_numpy_dtype_promotion": functools.partial(jax.numpy_dtype_promotion, "strict"),
    "jax_debug_nans": functools.partial(jax.debug_nans, True),
    "jax_debug_infs": functools.partial(jax.debug_infs, True),
}
TRACING = list(SWITCHES)[:3]

CONFIGS = {
    "pooled": PSAConfig(causal=True, **BLOCKS),
    "sampled": PSAConfig(mask_mode="thresholdbound", causal=True, importance="sampled", **BLOCKS),
    "antidiagonal": PSAConfig(
        importance="antidiagonal", sink_blocks=1, text_length=10, rest="mean", **BLOCKS
    ),
    "similarity": PSAConfig(block_n=128, attn_impl="old_mask_type", use_sim_mask=True),
    "budget": PSAConfig(importance="defect", mask_mode="budget", causal=True, **BLOCKS),
    "rows": PSAConfig(
        importance="defect", mask_mode="budget", budget_scope="row", rest="mean", **BLOCKS
    ),
    "Gilbert": PSAConfig(rearrange_method="Gilbert", grid=(4, 5, 8), **BLOCKS),
    "SemanticAware": PSAConfig(
        rearrange_method="SemanticAware", grid=(4, 5, 7), text_length=20, **BLOCKS
    ),
}


def arrays(rng, dtype=jnp.float32, kv_len=LENGTH):
    lengths = LENGTH, kv_len, kv_len
    return [jnp.asarray(rng.standard_normal((1, 2, n, 8)), dtype) for n in lengths]


def derivatives(q, k, v, *, config):
    """Both modes, of the whole call; rows that see nothing have lse -inf."""

    def f(*x):
        return psa_attention(*x, config=config)

    tangent = jax.jvp(f, (q, k, v), (q, k, v))[1]
    return tangent, jax.vjp(f, q, k, v)[1](q)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_traces(name, dtype, rng):
    for switch in TRACING:
        with SWITCHES[switch]():
            traced = jax.jit(functools.partial(derivatives, config=CONFIGS[name])).trace(
                *arrays(rng, dtype)
            )
            assert {x.dtype for x in jax.tree.leaves(traced.out_info)} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("name", ["gilbert", "hybrid"])
def test_video_layers_trace(name, rng):
    config = PSAConfig(rearrange_method=name.title(), grid=(4, 5, 8), **BLOCKS)
    module = PSAVideoAttention(config, warmup_steps=1, record_steps=3)

    def two_steps(step, *qkv):
        _, state = module.apply({}, *qkv, step=step, mutable=["psa"])
        return module.apply(state, *qkv, step=step + 1, branch="other", mutable=["psa"])

    plain = jax.jit(two_steps).trace(jnp.int32(0), *arrays(rng)).out_info
    for switch in TRACING:
        with SWITCHES[switch]():
            found = jax.jit(two_steps).trace(jnp.int32(0), *arrays(rng)).out_info
        assert jax.tree.map(str, found) == jax.tree.map(str, plain)


@pytest.mark.parametrize("switch", SWITCHES)
def test_the_rooms_give_the_same(switch, rng):
    q, k, v = arrays(rng, kv_len=KEYS)  # causal: the first rows see nothing

    def rooms():
        found = {}
        for name in ("pooled", "sampled", "budget") if switch in TRACING else ("pooled",):
            config = CONFIGS[name]
            scores = block_scores(q, k, config)
            levels = select_levels(scores, config, q_len=LENGTH, kv_len=KEYS)
            scores = scores if name != "budget" else scores[..., 3]
            segments = to_segments(levels, scores)
            found[name] = scores, levels, segments, from_segments(segments)
        table = build_table(levels), build_table(levels, transposed=True)
        cap = similarity_cap(k, CONFIGS["similarity"])
        return found, table, cap, build_pyramid(k, v, 32), kmeans(k, 2)

    # The debugging switches look at every result that a program makes outside `jit`.
    run = functools.partial(jax.jit, compiler_options=QUICK) if switch in TRACING else lambda f: f
    plain = run(rooms)()
    with SWITCHES[switch]():
        found = run(rooms)()
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
        assert getattr(x, "dtype", None) == getattr(y, "dtype", None)
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("switch", SWITCHES)
def test_attention_gives_the_same(switch, rng):
    q, k, v = arrays(rng, kv_len=KEYS)
    levels = jnp.asarray(rng.choice([0, 1, 2, 4, 8], size=(1, 2, 3, 4)), jnp.int32)

    def loss(q, k, v):
        out = sparse_attention(q, k, v, levels, is_causal=True, **BLOCKS)
        return (out**2).sum()

    def run():  # as a program does that compiles nothing itself
        grads = jax.grad(loss, (0, 1, 2))(q, k, v)
        return grads, jax.jvp(loss, (q, k, v), (q, k, v))[1]

    plain = run()
    with SWITCHES[switch]():
        found = run()
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("switch", TRACING)
def test_the_kernels_lower_for_cuda(switch):
    scores = jax.jit(functools.partial(peak_scores, config=PSAConfig(causal=True)))
    q, k = (jax.ShapeDtypeStruct((1, heads, 300, 64), "bfloat16") for heads in (4, 2))
    with SWITCHES[switch]():
        assert kernels_in(lower(**FAST[1])) == KERNELS
        text = scores.trace(q, k).lower(lowering_platforms=("cuda",)).as_text()
    assert kernels_in(text) == 1


def test_a_vmap_of_a_compiled_call_is_traced_by_the_same_rules(rng):
    qkv = [x[None] for x in arrays(rng)]
    call = jax.jit(functools.partial(psa_attention, config=CONFIGS["pooled"]))
    with contextlib.ExitStack() as stack:
        for switch in TRACING[1:]:
            stack.enter_context(SWITCHES[switch]())
        grad = jax.grad(lambda *x: jax.vmap(call)(*x).sum())
        jax.jit(grad, compiler_options=QUICK).trace(*qkv)
