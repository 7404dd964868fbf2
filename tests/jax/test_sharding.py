"""Arrays sharded over batch and heads stay where they are, on eight simulated devices."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = r"""
import re, sys
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from psa_jax import PSAConfig, psa_attention
from psa_jax.attention import gather

MOVES = ("all-gather", "all-to-all", "collective-permute", "reduce-scatter", "all-reduce")
assert jax.device_count() == 8

rng = np.random.default_rng(5)
q = rng.standard_normal((2, 8, 300, 16), np.float32)
k, v = (rng.standard_normal((2, 4, 300, 16), np.float32) for _ in range(2))
config = PSAConfig(mask_mode="thresholdbound", causal=True, block_m=64, block_n=32)
spec = P("data", "heads")


def attend(q, k, v):
    return psa_attention(q, k, v, config=config, return_lse=True, return_levels=True)


def both(attend, q, k, v):
    def loss(q, k, v):
        results = attend(q, k, v)
        return (results[0] ** 2).sum(), results

    grads, results = jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    return *results, *grads


def moved(program):
    '''Arrays, not scalars, that devices send to each other.'''
    found = []
    for line in program.as_text().splitlines():
        match = re.search(r"= (.*?) (%s)(-start)?\(" % "|".join(MOVES), line)
        if match and re.search(r"\[\d", match[1]):
            found.append(match[0])
    return found


def sharded(axes):
    mesh = jax.make_mesh((2, 4), ("data", "heads"), axis_types=(axes,) * 2)
    return mesh, [jax.device_put(x, NamedSharding(mesh, spec)) for x in (q, k, v)]


if sys.argv[1] == "control":  # a loop over heads has to bring them together
    for module in (gather.forward, gather.backward):
        module.__globals__["head_by_head"] = lambda shape: True
    _, arrays = sharded(AxisType.Auto)
    print(len(moved(jax.jit(attend).lower(*arrays).compile())))
    sys.exit()

if sys.argv[1] == "shared keys":  # every shard of the heads has all key heads
    mesh, (shards, *_) = sharded(AxisType.Auto)
    specs = spec, P("data"), P("data")
    run = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=spec)
    k, v = k[:, :1], v[:, :1]
    want = jax.jit(lambda *x: both(attend, *x))(q, k, v)
    for x, y in zip(jax.jit(lambda *x: both(run, *x))(shards, k, v), want, strict=True):
        np.testing.assert_allclose(jax.device_get(x), y, rtol=1e-5, atol=1e-5)
    sys.exit()

if sys.argv[1] == "video":  # memory and all follow the sharding of q
    from psa_jax.video import PSAVideoAttention

    ordered = PSAConfig(rearrange_method="Clusters", grid=(3, 8, 8), block_m=64, block_n=32)
    layer = PSAVideoAttention(ordered, warmup_steps=1, refresh_every=2)
    step = jax.jit(lambda state, n, *x: layer.apply(state, *x, step=n, mutable=["psa"]))
    inputs = [[x[:, :4, :192] for x in rng.standard_normal((3, 2, 4, 300, 8), np.float32)]
              for _ in range(3)]

    def outputs(place):
        state, found = {}, []
        for n, arrays in enumerate(inputs):
            out, state = step(state, n, *map(place, arrays))
            found.append(jax.device_get(out))
        return found

    want = outputs(jax.numpy.asarray)
    mesh, _ = sharded(AxisType.Explicit)
    with jax.set_mesh(mesh):
        got = outputs(lambda x: jax.device_put(x, NamedSharding(mesh, spec)))
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    sys.exit()

if sys.argv[1] == "sequence":
    axes = "data", "heads", "tokens"
    mesh = jax.make_mesh((2, 2, 2), axes, axis_types=(AxisType.Explicit,) * 3)
    want = jax.jit(lambda *x: both(attend, *x))(q, k, v)
    folded = P(None, None, ("heads", "tokens"))
    for spec in (P("data", None, "tokens"), P("data", "heads", "tokens"), folded):
        arrays = [jax.device_put(x, NamedSharding(mesh, spec)) for x in (q, k, v)]
        forward = jax.jit(lambda *x: psa_attention(*x, config=config)).lower(*arrays).compile()
        program = jax.jit(lambda *x: both(attend, *x)).lower(*arrays).compile()
        for index, (x, y) in enumerate(zip(program(*arrays), want, strict=True)):
            if index == 2:
                np.testing.assert_array_equal(jax.device_get(x), y)  # levels, bit for bit
                continue
            assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim), x.sharding
            np.testing.assert_allclose(jax.device_get(x), y, rtol=1e-5, atol=1e-5)
        kinds = {re.search("|".join(MOVES), line)[0] for line in moved(forward) + moved(program)}
        print(len(moved(forward)), len(moved(program)), *kinds)
    few = jax.device_put(k[:, :1], NamedSharding(mesh, P(None, None, "tokens")))
    try:
        psa_attention(jax.device_put(q, NamedSharding(mesh, P(None, None, "tokens"))), few, few)
    except ValueError as error:
        assert "divide over the 2 shards" in str(error), error
    else:
        raise AssertionError("one key head was spread over two devices")
    sys.exit()

want = jax.jit(lambda *x: both(attend, *x))(q, k, v)
for kind in ("auto", "explicit", "shard_map"):
    mesh, arrays = sharded(AxisType.Explicit if kind == "explicit" else AxisType.Auto)
    run = attend
    if kind == "shard_map":
        run = jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec)
    program = jax.jit(lambda *x: both(run, *x)).lower(*arrays).compile()
    for x, y in zip(program(*arrays), want, strict=True):
        assert tuple(x.sharding.spec)[:2] == ("data", "heads"), x.sharding
        assert x.addressable_shards[0].data.shape[:2] == (x.shape[0] // 2, x.shape[1] // 4)
        np.testing.assert_allclose(jax.device_get(x), y, rtol=1e-5, atol=1e-5)
    print(kind, len(moved(program)))

mesh, arrays = sharded(AxisType.Explicit)
long = jax.device_put(q, NamedSharding(mesh, P("data", None, None, "heads")))
for message, call in (
    ("sharded over batch, heads and sequence only", lambda: attend(long, *arrays[1:])),
    ("divide over the 4 shards", lambda: attend(arrays[0], k[:, :2], v[:, :2])),
):
    try:
        call()
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"accepted, although it should say: {message}")
"""


def run(what):
    flags = "--xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, what],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()


def test_nothing_but_scalars_moves():
    assert run("all") == ["auto", "0", "explicit", "0", "shard_map", "0"]


def test_a_sequence_moves_to_heads_and_back_and_nothing_else_moves():
    """q, k, v and out; then also lse (its gradient is none here), dout, dq, dk and dv."""
    assert run("sequence") == ["4", "9", "all-to-all"] * 3


def test_a_video_layer_and_its_memory_are_sharded():
    run("video")


def test_the_check_can_fail():
    (arrays,) = run("control")
    assert int(arrays) > 0


def test_gradients_of_keys_that_shards_share_are_summed():
    assert run("shared keys") == []
