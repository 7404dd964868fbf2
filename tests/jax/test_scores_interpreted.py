"""The scores kernel in Pallas' interpreter, against the float64 rules and against XLA.

As in `test_mosaic_interpreted`: outputs and shared memory start as NaN, and JAX 0.12 raises on
races. It is slow, so every case is a few tiles.
"""

import dataclasses
import functools
import types

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax import importance, psa_attention
from psa_jax._mosaic import products
from psa_jax._mosaic.device import interpreted, reset
from psa_jax.kernels import scores
from psa_jax.kernels.scores import api, peaks, schedule
from psa_jax.kernels.scores.samples import samples
from psa_jax.kernels.scores.tiles import PeakConfig
from psa_jax.selection import select_levels
from shared_specs import importance as np_importance
from shared_specs import selection as np_selection
from shared_specs.config import PSAConfig

RACES = tuple(map(int, jax.__version__.split(".")[:2])) >= (0, 12)
SLOW_ON_OLD = () if RACES else (pytest.mark.slow,)

pytestmark = pytest.mark.timeout(240)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    config: PSAConfig
    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    q_len: int = 300
    kv_len: int = 500
    head_dim: int = 64
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        fields = [
            f"{f.name}={getattr(self, f.name)}"
            for f in dataclasses.fields(self)
            if f.name != "config" and getattr(self, f.name) != f.default
        ]
        changed = [
            f"{f.name}={getattr(self.config, f.name)}"
            for f in dataclasses.fields(self.config)
            if getattr(self.config, f.name) != getattr(PSAConfig(), f.name)
        ]
        return ",".join(fields + changed) or "default"

    def inputs(self, rng):
        shapes = (self.heads, self.q_len), (self.kv_heads, self.kv_len)
        return tuple(
            jnp.asarray(rng.standard_normal((self.batch, *shape, self.head_dim)), self.dtype)
            for shape in shapes
        )


CASES = [
    Case(config=PSAConfig(importance_pool=8)),
    Case(
        config=PSAConfig(block_m=64, block_n=32, tile_n=8, importance_pool=8, causal=True),
        q_len=200,
        kv_len=2100,
    ),
    Case(
        config=PSAConfig(
            importance="sampled", sample_m=5, sample_n=3, causal=True, scale=-0.3, sample_seed=4
        ),
        batch=2,
        heads=2,
    ),
]
NEWER = [
    Case(config=PSAConfig(importance_pool=4, block_n=128), head_dim=128, heads=2),
    Case(config=PSAConfig(importance_pool=2, block_m=64), dtype="float16"),
    Case(config=PSAConfig(causal=True, importance_pool=8), q_len=500, kv_len=201),
    Case(config=PSAConfig(importance="sampled"), heads=4, kv_heads=2, q_len=129, kv_len=65),
    Case(config=PSAConfig(scale=0.0, importance_pool=8)),
    Case(config=PSAConfig(scale=1e-38, importance_pool=8, causal=True)),
    Case(config=PSAConfig(causal=True, importance_pool=8), q_len=1, kv_len=1),
    Case(config=PSAConfig(importance_pool=8), head_dim=40),
]
SLOW = [
    Case(config=PSAConfig(causal=True), batch=2, heads=4, kv_heads=2, q_len=700, kv_len=900),
    Case(config=PSAConfig(causal=True, importance="sampled", sample_n=64, sample_m=128)),
    Case(config=PSAConfig(block_n=32, tile_n=8, importance_pool=2), kv_len=2100, dtype="float16"),
]


@pytest.fixture
def interpreter(monkeypatch):
    """The kernel in the interpreter, cut small: two thread blocks share all the work."""

    def small(head_dim, key_blocks, is_causal):
        return PeakConfig(columns=64, stages=2, blocks=2, pairs=not is_causal)

    monkeypatch.setattr(api, "default_config", small)
    api._peak_scores.clear_cache()  # what a test broke must not serve the next one
    with interpreted(detect_races=RACES):
        yield
    reset()
    api._peak_scores.clear_cache()


def as_numpy(*arrays):
    return tuple(np.asarray(x.astype(jnp.float32)) for x in arrays)


def check(got, case, q, k):
    want = np_importance.block_scores(*as_numpy(q, k), case.config)
    assert got.dtype == jnp.float32
    # Rounded means move a logit of about 1 by 2^-11 of the largest products.
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-3)
    np.testing.assert_array_equal(np.asarray(got) == 0, want == 0)


@pytest.mark.parametrize(
    "case",
    CASES
    + [pytest.param(case, marks=SLOW_ON_OLD) for case in NEWER]
    + [pytest.param(case, marks=pytest.mark.slow) for case in SLOW],
    ids=str,
)
def test_scores(case, interpreter, rng):
    q, k = case.inputs(rng)
    got = importance.block_scores(q, k, case.config)
    check(got, case, q, k)
    estimator = getattr(importance, f"{case.config.importance}_scores")
    by_xla = estimator(q.astype(jnp.float32), k.astype(jnp.float32), case.config)
    np.testing.assert_allclose(got, by_xla, rtol=0, atol=1e-3)


SIZES = [
    PeakConfig(columns=64, stages=4, consumers=1, blocks=2, most_bytes=1),
    PeakConfig(columns=128, stages=3, query_stages=2, blocks=1),
    PeakConfig(columns=64, stages=2, consumers=3, pairs=False, blocks=1),
]


@pytest.mark.parametrize(
    "sizes",
    SIZES[:1]
    + [pytest.param(SIZES[1], marks=SLOW_ON_OLD), pytest.param(SIZES[2], marks=pytest.mark.slow)],
    ids=lambda s: f"{s.consumers}x{s.columns}",
)
def test_every_way_to_cut_it_gives_the_same(sizes, interpreter, monkeypatch, rng):
    """Also one head at a time: the first of them launches the kernel once per head."""
    monkeypatch.setattr(api, "default_config", lambda *_: sizes)
    config = PSAConfig(importance="sampled", sample_m=16, sample_n=3, causal=True)
    case = Case(config=config, heads=2, q_len=140)
    q, k = case.inputs(rng)
    check(importance.block_scores(q, k, case.config), case, q, k)


def test_any_finite_input_stays_in_range(interpreter, rng):
    """Blocks of 2^100 and of 2^-100 in one head, which float16 alone does not hold."""
    case = Case(config=PSAConfig(importance_pool=8, block_m=64, scale=1.0), q_len=128, kv_len=128)
    q, k = case.inputs(rng)
    powers = jnp.repeat(jnp.asarray([100.0, -100.0]), 64)[:, None]
    q, k = q * jnp.exp2(powers).astype(q.dtype), k * jnp.exp2(-powers[::-1]).astype(k.dtype)
    got = importance.block_scores(q, k, case.config)
    want = np_importance.block_scores(*as_numpy(q, k), case.config)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-2)


def test_transformations(interpreter, rng):
    """`vmap` makes the batch longer; nothing is differentiated; the whole call uses the kernel."""
    options = {"importance": "sampled", "sample_m": 4, "sample_n": 1, "block_n": 128}
    config = PSAConfig(**options, attn_impl="old_mask_type")
    case = Case(config=config, batch=2, q_len=128, kv_len=300)
    q, k = case.inputs(rng)

    def loss(q, k):
        scores = jax.vmap(functools.partial(importance.block_scores, config=config))(
            q[:, None], k[:, None]
        )
        return scores.sum() + q.astype(jnp.float32).sum(), scores[:, 0]

    (dq, dk), got = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(q, k)
    check(got, case, q, k)
    assert (dq == 1).all() and (dk == 0).all()

    _, levels = psa_attention(q, k, k, config=config, implementation="gather", return_levels=True)
    np.testing.assert_array_equal(levels, select_levels(got, config, q_len=128, kv_len=300))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("pool", [4, 8])
def test_means_in_float16_choose_the_same_levels(dtype, pool, rng):
    """At least 99.9 % of the blocks, on random tokens, whose scores lie closest."""
    config = PSAConfig(importance_pool=pool, block_n=32, tile_n=8)
    q, k = Case(config=config, heads=4, kv_heads=4, q_len=2048, kv_len=2048, dtype=dtype).inputs(
        rng
    )
    rows, columns = (samples(x, config, keys=keys) for x, keys in ((q, False), (k, True)))
    exact = [
        np.asarray(s.values, np.float64) * np.asarray(s.scale, np.float64)[..., None, None]
        for s in (rows, columns)
    ]
    # The rounded means as tokens of their own: with one token per group the rules do the rest.
    at = [np.arange(s.first.size) * pool // block for s, block in ((rows, 128), (columns, 32))]
    flat = [x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in exact]
    visible = np.ones((at[0].size, at[1].size), bool)
    got = np_importance._ratio_to_row_maximum(*flat, visible, *at, config)
    want = np_importance.block_scores(*as_numpy(q, k), config)
    lengths = {"q_len": 2048, "kv_len": 2048}
    chosen, right = (np_selection.select_levels(s, config, **lengths) for s in (got, want))
    assert (chosen == right).mean() >= 0.999


def keys_left_as_they_are(values):
    return values.reshape(-1, values.shape[2], values.shape[4])


def straddling_tiles_unmasked(self):
    spans = right_spans.func(self)
    return spans[:, [1, 1]]


def one_tile_short(self):
    return np.maximum(right_spans.func(self) - [0, 1], 0).astype(np.int32)


right_spans = schedule.Walk.__dict__["spans"]

MISTAKES = {
    "wrong order of columns": (api, "_by_place", keys_left_as_they_are),
    "diagonal not masked": (schedule.Walk, "spans", property(straddling_tiles_unmasked)),
    "last tile skipped": (schedule.Walk, "spans", property(one_tile_short)),
}


@pytest.mark.parametrize(
    "mistake",
    ["wrong order of columns", "diagonal not masked"]
    + [pytest.param("last tile skipped", marks=SLOW_ON_OLD)],
)
def test_a_broken_kernel_is_caught(mistake, interpreter, monkeypatch, rng):
    monkeypatch.setattr(*MISTAKES[mistake])
    config = PSAConfig(importance="sampled", sample_m=4, sample_n=2, causal=True)
    case = Case(config=config, q_len=256, kv_len=300)
    q, k = case.inputs(rng)
    got = importance.block_scores(q, k, case.config)
    with pytest.raises(AssertionError):
        check(got, case, q, k)


@pytest.mark.skipif(not RACES, reason="JAX before 0.12 records races but does not raise")
def test_a_buffer_filled_too_early_is_a_race(interpreter, monkeypatch, rng):
    """A copy that does not wait for readers; the drain at the end still balances the barriers."""
    impatient = types.SimpleNamespace(**vars(plgpu))
    impatient.barrier_wait = lambda barrier: None
    monkeypatch.setattr(peaks, "plgpu", impatient)
    monkeypatch.setattr(products, "plgpu", plgpu)
    case = Case(config=PSAConfig(importance_pool=8))
    with pytest.raises(Exception, match="[Rr]ace"):
        importance.block_scores(*case.inputs(rng), case.config)


def test_unsupported_says_why():
    def reason(dtype="bfloat16", dim=64, **fields):
        x = jnp.zeros((1, 1, 128, dim), dtype)
        return scores.unsupported(x, x, PSAConfig(**fields))

    assert "float32" in reason("float32")
    assert "up to 128, got 256" in reason(dim=256)
    assert "antidiagonal" in reason(importance="antidiagonal")
    if jax.default_backend() == "cpu":
        assert "cpu" in reason()
        with interpreted():
            assert reason() is None


@pytest.mark.parametrize(
    ("wrong", "named"), [({"columns": 96}, "columns"), ({"stages": 1}, "stages")], ids=str
)
def test_sizes_that_the_kernel_does_not_take_are_refused(wrong, named):
    with pytest.raises(ValueError, match=named):
        PeakConfig(**wrong)
