"""Random shapes and layouts against the oracle; random and mangled data into the loaders."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psa_torch import sparse_attention
from shared_specs import PSAConfig
from shared_specs import attention as oracle
from shared_specs.masks import from_segments, to_segments

LAYOUTS = [
    lambda x: x,
    lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    lambda x: x[:, :1].expand_as(x),
]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_attention_of_any_shape_is_the_oracle(data):
    draw = data.draw
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    block_m, block_n = draw(st.sampled_from([64, 128])), draw(st.sampled_from([32, 64, 128]))
    q_len, kv_len = draw(st.integers(1, 200)), draw(st.integers(1, 300))
    dim, batch = draw(st.sampled_from([8, 24, 64])), draw(st.integers(1, 2))
    arrange = draw(st.sampled_from(LAYOUTS))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))

    def tensor(heads, length):
        return arrange(torch.from_numpy(rng.standard_normal((batch, heads, length, dim))))

    q, k, v = tensor(kv_heads * group, q_len), tensor(kv_heads, kv_len), tensor(kv_heads, kv_len)
    shape = (batch, kv_heads * group, -(-q_len // block_m), -(-kv_len // block_n))
    levels = rng.choice([0, 1, 2, 4, 8], shape).astype(np.int32)
    call = {"block_m": block_m, "block_n": block_n, "is_causal": draw(st.booleans())}
    form = to_segments(levels) if draw(st.booleans()) else levels
    out, lse = sparse_attention(q, k, v, torch.from_numpy(form), return_lse=True, **call)
    want, want_lse = oracle.sparse_attention(*(x.numpy() for x in (q, k, v)), levels,
                                             return_lse=True, **call)  # fmt: skip
    np.testing.assert_allclose(out.numpy(), want, atol=1e-11)
    np.testing.assert_allclose(lse.numpy(), want_lse, atol=1e-11)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
FIELDS = st.sampled_from(list(PSAConfig().to_dict()))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.dictionaries(FIELDS, JSON, max_size=3))
def test_mangled_configurations_are_refused_or_whole(fields):
    try:
        config = PSAConfig.from_json(json.dumps(fields))
    except (ValueError, TypeError) as error:
        assert str(error)
    else:
        assert PSAConfig.from_json(config.to_json()) == config


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.binary(max_size=200))
def test_random_bytes_are_no_configuration(data):
    if data.strip() in (b"{}", b""):
        return
    with pytest.raises((ValueError, TypeError)):
        PSAConfig.from_json(data)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(1, 6), st.data())
def test_mangled_segments_are_refused_or_whole(blocks, data):
    row = data.draw(st.lists(st.integers(-3, 9), min_size=blocks + 5, max_size=blocks + 5))
    segments = np.array(row).reshape(1, 1, 1, -1)
    try:
        levels = from_segments(segments)
    except ValueError as error:
        assert str(error)
    else:
        np.testing.assert_array_equal(from_segments(to_segments(levels)), levels)
