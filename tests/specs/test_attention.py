"""The oracle itself: against brute force over keys, finite differences, and limit cases."""

import numpy as np
import pytest

from shared_specs.attention import sparse_attention, sparse_attention_grad
from shared_specs.masks import to_segments


def draw(
    rng, *, batch=1, heads=2, kv_heads=1, q_len=100, kv_len=150, dim=8, block_m=64, block_n=32
):
    q = rng.standard_normal((batch, heads, q_len, dim))
    k, v = (rng.standard_normal((batch, kv_heads, kv_len, dim)) for _ in range(2))
    shape = (batch, heads, -(-q_len // block_m), -(-kv_len // block_n))
    return q, k, v, rng.choice([0, 1, 2, 4, 8], shape).astype(np.int32)


def brute_force(q, k, v, levels, block_m, block_n, scale, is_causal, rest="skip"):
    """Every row on its own, token by token, straight from the formula."""
    out, lse = np.zeros(q.shape), np.full(q.shape[:3], -np.inf)
    q_len, kv_len = q.shape[2], k.shape[2]
    for b, h, r in np.ndindex(q.shape[:3]):
        g = h // (q.shape[1] // k.shape[1])
        logits, values = [], []
        for j, level in enumerate(levels[b, h, r // block_m]):
            if level == 0:
                if rest == "skip":
                    continue
                level = block_n
            for start in range(j * block_n, min((j + 1) * block_n, kv_len), level):
                stop = min(start + level, kv_len)
                if is_causal and stop - 1 > r + kv_len - q_len:
                    continue
                logits.append(
                    scale * q[b, h, r] @ k[b, g, start:stop].mean(0) + np.log(stop - start)
                )
                values.append(v[b, g, start:stop].mean(0))
        if logits:
            top = max(logits)
            weights = np.exp(np.array(logits) - top)
            out[b, h, r] = weights @ np.array(values) / weights.sum()
            lse[b, h, r] = top + np.log(weights.sum())
    return out, lse


@pytest.mark.parametrize("rest", ["skip", "mean"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("block_m, block_n", [(64, 32), (128, 64), (64, 128)])
def test_matches_brute_force(block_m, block_n, is_causal, rest):
    rng = np.random.default_rng([block_m, block_n, is_causal])
    q, k, v, levels = draw(
        rng, batch=2, heads=4, kv_heads=2, q_len=130, kv_len=197, block_m=block_m, block_n=block_n
    )
    levels[0, 0, 0] = 0
    kwargs = {"block_m": block_m, "block_n": block_n, "scale": 0.3, "is_causal": is_causal}
    kwargs["rest"] = rest
    out, lse = sparse_attention(q, k, v, levels, **kwargs, return_lse=True)
    expected_out, expected_lse = brute_force(
        q, k, v, levels, block_m, block_n, 0.3, is_causal, rest
    )
    np.testing.assert_allclose(out, expected_out, atol=1e-12)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-12)
    if rest == "skip":
        assert np.isneginf(lse[0, 0, :block_m]).all() and not out[0, 0, :block_m].any()
    elif not is_causal:
        assert np.isfinite(lse).all()


def test_level_one_everywhere_is_dense_attention():
    rng = np.random.default_rng(1)
    q, k, v, levels = draw(rng)
    levels[:] = 1
    logits = np.einsum("bhqd,bhkd->bhqk", q, np.repeat(k, 2, 1)) * 8**-0.5
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    dense = weights / weights.sum(-1, keepdims=True) @ np.repeat(v, 2, 1)
    out = sparse_attention(q, k, v, levels, block_m=64, block_n=32)
    np.testing.assert_allclose(out, dense, atol=1e-13)


def test_segments_and_dense_levels_are_one_thing():
    rng = np.random.default_rng(2)
    q, k, v, levels = draw(rng)
    kwargs = {"block_m": 64, "block_n": 32}
    np.testing.assert_array_equal(
        sparse_attention(q, k, v, to_segments(levels), **kwargs),
        sparse_attention(q, k, v, levels, **kwargs),
    )


def test_constant_keys_make_pooling_exact():
    """With equal keys inside each group of 8, every level gives dense attention."""
    rng = np.random.default_rng(3)
    q, k, v, levels = draw(rng, kv_len=128)
    k, v = (np.repeat(x[:, :, ::8], 8, axis=2) for x in (k, v))
    levels[:] = rng.choice([1, 2, 4, 8], levels.shape)
    kwargs = {"block_m": 64, "block_n": 32}
    out, lse = sparse_attention(q, k, v, levels, **kwargs, return_lse=True)
    dense, dense_lse = sparse_attention(q, k, v, levels * 0 + 1, **kwargs, return_lse=True)
    np.testing.assert_allclose(out, dense, atol=1e-13)
    np.testing.assert_allclose(lse, dense_lse, atol=1e-13)


@pytest.mark.parametrize("rest", ["skip", "mean"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients_by_finite_differences(is_causal, rest):
    rng = np.random.default_rng([4, is_causal])
    q, k, v, levels = draw(rng, heads=4, kv_heads=2, q_len=70, kv_len=75, dim=8)
    levels[0, 1, 0] = 0
    dout = rng.standard_normal(q.shape)
    dlse = rng.standard_normal(q.shape[:3])
    kwargs = {"block_m": 64, "block_n": 32, "is_causal": is_causal, "rest": rest}

    def loss(q, k, v):
        out, lse = sparse_attention(q, k, v, levels, **kwargs, return_lse=True)
        return (out * dout).sum() + (np.where(np.isneginf(lse), 0, lse) * dlse).sum()

    grads = sparse_attention_grad(q, k, v, levels, dout, **kwargs, dlse=dlse)
    assert all(np.isfinite(g).all() for g in grads)
    for which, grad in enumerate(grads):
        for _ in range(4):
            args = [q, k, v]
            direction = rng.standard_normal(args[which].shape)
            step = 1e-5
            plus, minus = list(args), list(args)
            plus[which] = args[which] + step * direction
            minus[which] = args[which] - step * direction
            slope = (loss(*plus) - loss(*minus)) / (2 * step)
            np.testing.assert_allclose((grad * direction).sum(), slope, rtol=1e-6, atol=1e-7)


def test_equal_keys_in_a_block_make_the_rest_exact():
    """A block seen through its mean is then the block itself, ragged last one included."""
    rng = np.random.default_rng(7)
    q, k, v, levels = draw(rng, kv_len=150)
    k, v = (np.repeat(x[:, :, ::32], 32, axis=2)[:, :, :150] for x in (k, v))
    kwargs = {"block_m": 64, "block_n": 32, "return_lse": True}
    seen = sparse_attention(q, k, v, levels, **kwargs, rest="mean")
    dense = sparse_attention(q, k, v, levels * 0 + 1, **kwargs)
    for got, want in zip(seen, dense, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-13)


def test_empty_rows_have_no_gradient():
    rng = np.random.default_rng(5)
    q, k, v, levels = draw(rng)
    levels[:] = 0
    grads = sparse_attention_grad(
        q, k, v, levels, rng.standard_normal(q.shape), block_m=64, block_n=32,
        dlse=rng.standard_normal(q.shape[:3]),
    )  # fmt: skip
    assert not any(g.any() for g in grads)


def test_wrong_levels_are_refused():
    rng = np.random.default_rng(6)
    q, k, v, levels = draw(rng)
    with pytest.raises(ValueError, match="levels must be"):
        sparse_attention(q, k, v, levels[:, :1], block_m=64, block_n=32)
    with pytest.raises(ValueError, match="rest must be one of 'skip', 'mean', got 'none'"):
        sparse_attention(q, k, v, levels, block_m=64, block_n=32, rest="none")
    levels[0, 0, 0, 0] = 3
    with pytest.raises(ValueError, match="got 3"):
        sparse_attention(q, k, v, levels, block_m=64, block_n=32)
