"""The warp-specialised forward, run as threads: same answers, no deadlock, no early release."""

import dataclasses
from unittest import mock

import pytest
import torch

from psa_torch.attention.triton.configs import HopperForwardConfig
from psa_torch.attention.triton.forward import forward
from tests.torch import gluon_interpreter
from tests.torch.attention_contract import Case, expected, to_numpy

forward_hopper = pytest.importorskip("psa_torch.attention.triton.forward_hopper")

BASE = Case(batch=1, kv_heads=1, block_m=128, head_dim=64, q_len=200, kv_len=700)
CASES = [
    BASE,
    dataclasses.replace(BASE, block_n=32, heads=1),
    dataclasses.replace(BASE, block_n=128, is_causal=True, scale=-0.3),
    dataclasses.replace(BASE, q_len=300, kv_len=150, is_causal=True),
    dataclasses.replace(BASE, heads=1, q_len=1, kv_len=1, level=8),
    dataclasses.replace(BASE, level="empty"),
    dataclasses.replace(BASE, heads=1, kv_len=1500, level=1),
]


class _Interpreted:
    """Stands in for the kernel: float32 on the CPU instead of half precision on the GPU."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*args, num_warps, **constants):
            gluon_interpreter.launch(self.kernel, grid, *args, **constants)

        return launch


@pytest.fixture(autouse=True)
def interpreted():
    kernel = _Interpreted(forward_hopper.attention_forward_hopper)
    with (
        mock.patch.object(forward_hopper, "attention_forward_hopper", kernel),
        mock.patch.object(forward_hopper, "DTYPES", (torch.float32,)),
    ):
        yield


@pytest.mark.parametrize("tile,slots", [(64, 2), (128, 3)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_oracle(case, tile, slots, rng):
    inputs = case.inputs(rng)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    settings = {**case.settings(), "scale": scale}
    config = HopperForwardConfig(tile=tile, slots=slots)
    out, lse = forward(*inputs[:4], config=config, **settings)
    want = expected(inputs, **settings)
    torch.testing.assert_close(out.double(), torch.from_numpy(want.out), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(lse.double(), torch.from_numpy(want.lse), rtol=1e-6, atol=2e-6)
    assert not to_numpy(out)[torch.isneginf(lse).numpy()].any()


@pytest.mark.parametrize("deaf", range(4), ids=["k_full", "k_empty", "v_full", "v_empty"])
def test_a_missing_wait_is_noticed(deaf, rng, monkeypatch):
    """Without one of its waits the kernel gives a wrong answer or never ends."""
    case = dataclasses.replace(BASE, heads=1, q_len=128, kv_len=2000, level=1)
    inputs = case.inputs(rng)
    settings = {**case.settings(), "scale": 0.125}
    want, _ = forward(*inputs[:4], **settings)
    allocate = gluon_interpreter._Language.allocate_shared_memory
    barriers = []

    def allocate_deaf(dtype, shape, layout):
        memory = allocate(dtype, shape, layout)
        if isinstance(memory, gluon_interpreter.Barrier):
            barriers.append(memory)
            if len(barriers) == deaf + 1:
                for barrier in memory.all:
                    barrier.wait = lambda parity: None
        return memory

    # Whoever should have been waited for is slow.
    slow = "COPY_SECONDS" if deaf in (0, 2) else "PRODUCT_SECONDS"
    monkeypatch.setattr(gluon_interpreter, slow, 0.01)
    monkeypatch.setattr(gluon_interpreter, "TIMEOUT", 2.0)
    monkeypatch.setattr(gluon_interpreter._Language, "allocate_shared_memory", allocate_deaf)
    with pytest.raises((AssertionError, TimeoutError)):
        out, _ = forward(*inputs[:4], config=HopperForwardConfig(tile=64, slots=2), **settings)
        torch.testing.assert_close(out, want)
