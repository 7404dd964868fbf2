"""All implementations on the same inputs: integers equal, numbers within their budget."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psa_jax.conformance import JaxAdapter
from psa_torch.conformance import TorchAdapter
from shared_specs import PSAConfig
from shared_specs.masks import from_segments, to_segments
from shared_specs.selection import select_levels
from shared_specs.table import build_table
from shared_specs.tools import parity
from shared_specs.tools.cli import main

TORCH, JAX = TorchAdapter("gather"), JaxAdapter("gather")


def test_every_implementation_is_within_its_budget():
    adapters = [TORCH, TorchAdapter("triton"), JAX]
    results = parity.run_parity(adapters, parity.SIZES["tiny"], ["float32", "bfloat16"])
    assert not parity.failures(results), json.dumps(parity.failures(results), indent=1)
    measured = {row["implementation"] for row in results["errors"] if "relative" in row}
    assert measured == {adapter.name for adapter in adapters}


def test_a_wrong_implementation_is_over_its_budget():
    class Wrong(TorchAdapter):
        def forward(self, q, k, v, levels, **call):
            return super().forward(q, k, v, np.where(levels == 8, 4, levels), **call)

    workload = parity.SIZES["tiny"][:1]
    over = parity.failures(parity.run_parity([Wrong("gather")], workload, ["bfloat16"]))
    assert {row["output"] for row in over} == {"out"}


def test_the_command_writes_what_it_prints(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(parity, "find_adapters", lambda device: ([TORCH], {"x": "no such thing"}))
    arguments = ["parity", "--sizes", "tiny", "--dtype", "float32"]
    files = ["--json", str(tmp_path / "p.json"), "--figure", str(tmp_path / "p.png")]
    assert main([*arguments, *files]) == 0
    printed = capsys.readouterr().out
    assert "torch gather" in printed and "not run: x: no such thing" in printed
    assert json.loads((tmp_path / "p.json").read_text())["errors"]
    assert (tmp_path / "p.png").stat().st_size > 1000


RATIOS = st.lists(st.sampled_from([0.0, 0.05, 0.1, 0.2, 0.3]), min_size=4, max_size=4)


@st.composite
def selections(draw):
    block_n = draw(st.sampled_from([32, 64, 128]))
    starts = np.concatenate([[0.0], np.cumsum(draw(RATIOS))]).clip(max=1.0).tolist()
    config = PSAConfig(
        block_m=draw(st.sampled_from([64, 128])),
        block_n=block_n,
        tile_n=draw(st.sampled_from([8, 16, 32])),
        mask_mode=draw(st.sampled_from(["topk", "thresholdbound"])),
        mask_ratios={
            level: (a, b) for level, a, b in zip((1, 2, 4, 8), starts, starts[1:], strict=False)
        },
        causal=draw(st.booleans()),
        sink_blocks=draw(st.integers(0, 2)),
        text_length=draw(st.sampled_from([0, 0, 1, 70])),
        text_position=draw(st.sampled_from(["start", "end"])),
    )
    lengths = {"q_len": draw(st.integers(1, 400)), "kv_len": draw(st.integers(1, 900))}
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = (1, 2, -(-lengths["q_len"] // config.block_m), -(-lengths["kv_len"] // block_n))
    scores = rng.random(shape, np.float32) ** draw(st.sampled_from([1, 8]))
    if draw(st.booleans()):
        scores = np.floor(scores * 4) / np.float32(4)  # ties and zeros
    return config, lengths, scores


@settings(max_examples=12, deadline=None, derandomize=True)
@given(selections())
def test_levels_and_tables_are_equal_in_all_three(case):
    config, lengths, scores = case
    expected = select_levels(scores, config, **lengths)
    for adapter in (TORCH, JAX):
        levels = adapter.select(scores, config, **lengths, cap=None)
        np.testing.assert_array_equal(levels, expected)
        for transposed in (False, True):
            for a, b in zip(
                adapter.table(expected, transposed=transposed),
                build_table(expected, transposed=transposed),
                strict=True,
            ):
                np.testing.assert_array_equal(a, b)


def test_segments_are_equal_in_all_three():
    import jax.numpy as jnp
    import torch

    from psa_jax import masks as jax_masks
    from psa_torch import masks as torch_masks

    rng = np.random.default_rng(0)
    levels = rng.choice([0, 1, 2, 4, 8], (2, 2, 3, 19)).astype(np.int32)
    scores = np.floor(rng.random(levels.shape, np.float32) * 6) / np.float32(6)
    for known in (None, scores):
        expected = to_segments(levels, known)
        in_torch = torch_masks.to_segments(
            torch.from_numpy(levels), None if known is None else torch.from_numpy(known)
        )
        in_jax = jax_masks.to_segments(jnp.asarray(levels), known)
        for found in (in_torch.numpy(), np.asarray(in_jax)):
            np.testing.assert_array_equal(found, expected)
            np.testing.assert_array_equal(from_segments(found), levels)


LAYOUTS = {
    "heads last": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every other row": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "every other channel": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "one head broadcast": lambda x: x[:, :1].expand_as(x),
    "channels first": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("implementation", ["gather", "triton"])
def test_layouts_do_not_matter(layout, implementation):
    """Strided and broadcast torch views give what their contiguous copies give."""
    import torch

    from psa_torch import sparse_attention

    rng = np.random.default_rng(1)
    drawn = (rng.standard_normal((2, h, 70, 32), np.float32) for h in (4, 2, 2))
    views = [LAYOUTS[layout](torch.from_numpy(x)) for x in drawn]
    assert not any(x.is_contiguous() for x in views)
    levels = torch.from_numpy(rng.choice([0, 1, 2, 4, 8], (2, 4, 1, 3)).astype(np.int32))
    kwargs = {"block_m": 128, "block_n": 32, "implementation": implementation}
    copies = [x.contiguous() for x in views]
    assert torch.equal(
        sparse_attention(*views, levels, **kwargs), sparse_attention(*copies, levels, **kwargs)
    )
