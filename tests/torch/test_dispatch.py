"""The rooms send tensors to their Triton kernels and get what plain torch gives.

`forced_kernels` stands in for CUDA; on a machine without a GPU the kernels run in Triton's
interpreter (see conftest.py).
"""

import contextlib

import pytest
import torch

from psa_torch import PSAConfig, _dispatch, psa_attention
from psa_torch._dispatch import forced_kernels, use_kernels
from psa_torch.importance import block_scores
from psa_torch.pyramid import build_pyramid
from psa_torch.selection import select_levels
from psa_torch.similarity import similarity_cap
from psa_torch.table import build_table

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="CPU tensors need interpretation")


def tensors(*shapes):
    generator = torch.Generator().manual_seed(len(shapes))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def both(function):
    plain = function()
    with forced_kernels():
        return function(), plain


def test_who_takes_the_kernels():
    x = torch.rand(2)
    assert not use_kernels(x)
    with forced_kernels():
        assert use_kernels(x) and not use_kernels(x.double())
    with contextlib.suppress(RuntimeError), forced_kernels():
        raise RuntimeError
    assert not use_kernels(x)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("importlib.util.find_spec", lambda name: None), "triton is not installed"),
        (("torch.version.hip", "7.0"), "this is a ROCm build of torch"),
        (("torch.cuda.get_device_capability", lambda index: (7, 5)), "this GPU has 7.5"),
    ],
)
def test_gpus_without_kernels_are_named(change, reason, monkeypatch, caplog):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda index: (9, 0))
    assert _dispatch._kernels_run_on.__wrapped__(0)
    _dispatch.announce.forget()
    monkeypatch.setattr(*change)
    assert not _dispatch._kernels_run_on.__wrapped__(0)
    assert reason in caplog.text


def test_pyramid():
    k, v = tensors((1, 2, 100, 32), (1, 2, 100, 32))
    got, want = both(lambda: build_pyramid(k, v, 32))
    torch.testing.assert_close(tuple(got), tuple(want))


@pytest.mark.parametrize("importance", ["pooled", "sampled", "antidiagonal"])
def test_scores(importance):
    q, k = tensors((1, 2, 200, 32), (1, 1, 300, 32))
    config = PSAConfig(importance=importance, causal=True)
    got, want = both(lambda: block_scores(q, k, config))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_similarity():
    (k,) = tensors((1, 2, 300, 32))
    k = k.cumsum(2)
    old = {"attn_impl": "old_mask_type", "block_n": 128, "use_sim_mask": True}
    config = PSAConfig(**old, sim_2x_threshold=0.99, sim_4x_threshold=0.97, sim_8x_threshold=0.8)
    got, want = both(lambda: similarity_cap(k, config))
    assert torch.equal(got, want)


@pytest.mark.parametrize("mode", ["topk", "thresholdbound"])
def test_selection(mode):
    scores = torch.rand(1, 1, 3, 30, generator=torch.Generator().manual_seed(3))
    config = PSAConfig(mask_mode=mode, sink_blocks=1, text_length=10)
    got, want = both(lambda: select_levels(scores, config, q_len=300, kv_len=1900))
    assert torch.equal(got, want)


@pytest.mark.parametrize("transposed", [False, True])
def test_table(transposed):
    generator = torch.Generator().manual_seed(4)
    levels = torch.tensor([0, 1, 2, 4, 8])[torch.randint(5, (1, 2, 3, 9), generator=generator)]
    got, want = both(lambda: build_table(levels.int(), transposed=transposed))
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_the_whole_call():
    q, k, v = (x.requires_grad_() for x in tensors(*[(1, 1, 140, 32)] * 3))

    def call():
        out = psa_attention(q, k, v, implementation="triton")
        return out.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v))

    got, want = both(call)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
