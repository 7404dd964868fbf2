"""Peers are called in their own layout, with their own lists, and skipped where they are absent."""

import sys
import types
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.inputs import make_inputs
from benchmarks.torch_peers import peers
from benchmarks.torch_session import TorchSession
from benchmarks.workloads import BACKWARD, BOTH, FORWARD, Workload
from shared_specs import PSAConfig


class Lists(NamedTuple):
    partial_count: torch.Tensor
    partial: torch.Tensor
    whole_count: torch.Tensor
    whole: torch.Tensor
    block_size: Any

    def kept(self) -> torch.Tensor:
        """The mask that the lists say."""
        found = torch.zeros(self.whole.shape, dtype=torch.bool)
        for count, ids in ((self.partial_count, self.partial), (self.whole_count, self.whole)):
            listed = torch.arange(ids.shape[-1]) < count[..., None]
            found |= torch.zeros_like(found).scatter(-1, ids.long(), listed)
        return found


@pytest.fixture
def session():
    work = Workload(
        name="small",
        device="cpu",
        heads=2,
        kv_heads=2,
        length=512,
        head_dim=32,
        dtype="float32",
        config=PSAConfig(),
    )
    return TorchSession(work, make_inputs(work))


@pytest.fixture
def installed(monkeypatch):
    """A stand-in for flash-attention-4 that computes what it is asked, and what it was asked."""
    asked = []

    def attention(q, k, v, *, block_sparse_tensors=None, **options):
        asked.append({"block_sparse_tensors": block_sparse_tensors, **options})
        mask = None
        if block_sparse_tensors is not None:
            kept = block_sparse_tensors.kept()
            mask = kept.repeat_interleave(128, 2).repeat_interleave(128, 3)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, mask).transpose(1, 2), None

    names = ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface")
    modules = {name: types.ModuleType(name) for name in names}
    modules["flash_attn.cute.interface"].flash_attn_func = attention
    sparsity = modules["flash_attn.cute.block_sparsity"] = types.ModuleType("block_sparsity")
    sparsity.BlockSparseTensorsTorch = Lists
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return asked


def expected(session, mask, which):
    inputs = session.leaves
    out = scaled_dot_product_attention(*inputs, mask)
    return out if which == FORWARD else torch.autograd.grad(out, inputs, session.dout)


@pytest.mark.parametrize("which", (FORWARD, BACKWARD, BOTH))
@pytest.mark.parametrize("sparse", (False, True))
def test_a_peer_computes_attention_of_the_workload(session, installed, sparse, which):
    peer = peers(session)[sparse]
    mask = None
    if sparse:
        mask = torch.from_numpy(np.kron(session.binary_levels(), np.ones((128, 128)))) > 0
        assert not mask.all()
    found = peer.build(which)()
    if which == FORWARD:
        torch.testing.assert_close(peer.output(found), expected(session, mask, which))
    else:
        for got, want in zip(found, expected(session, mask, which), strict=True):
            torch.testing.assert_close(got.transpose(1, 2), want)


def test_the_backward_pass_gets_lists_of_its_own(session, installed):
    peers(session)[1].build(FORWARD)()
    kept = torch.from_numpy(session.binary_levels()) > 0
    assert not torch.equal(kept, kept.transpose(-1, -2))
    lists = installed[-1]["block_sparse_tensors"], installed[-1]["block_sparse_tensors_bwd"]
    assert torch.equal(lists[0].kept(), kept)
    assert torch.equal(lists[1].kept(), kept.transpose(-1, -2))


def test_an_absent_peer_says_so(session):
    for peer in peers(session):
        with pytest.raises(ImportError, match="flash_attn"):
            peer.build(FORWARD)
