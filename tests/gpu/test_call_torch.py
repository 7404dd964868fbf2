"""The whole torch call on a CUDA device: streams, graphs, repeatability, size, no host waits."""

import pytest
import torch

from psa_torch import psa_attention, sparse_attention
from shared_specs import PSAConfig

pytestmark = pytest.mark.gpu

CONFIGS = {
    "default": PSAConfig(),
    "causal": PSAConfig(causal=True, block_n=32, sink_blocks=1),
    "thresholdbound": PSAConfig(mask_mode="thresholdbound", block_n=128),
    "similarity": PSAConfig(attn_impl="old_mask_type", block_n=128, use_sim_mask=True),
    "sampled": PSAConfig(importance="sampled"),
    "antidiagonal": PSAConfig(importance="antidiagonal", causal=True),
}


def draw(heads=4, kv_heads=2, length=2050, head_dim=64, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)

    def tensor(h):
        return torch.randn(1, h, length, head_dim, device="cuda", dtype=dtype, generator=generator)

    return tensor(heads), tensor(kv_heads), tensor(kv_heads)


@pytest.mark.parametrize("name", CONFIGS)
def test_repeats_bit_for_bit(name):
    q, k, v = (x.requires_grad_() for x in draw())

    def run():
        out = psa_attention(q, k, v, config=CONFIGS[name])
        return out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    assert all(x.isfinite().all() for x in first)


@pytest.mark.parametrize("name", CONFIGS)
def test_graph_capture_and_replay(name):
    q, k, v = draw()
    config = CONFIGS[name]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # compile and warm up off the default stream
        psa_attention(q, k, v, config=config)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Only what this thread does counts: threads of a JAX client in the process poll its streams.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = psa_attention(q, k, v, config=config)
    fresh = draw(seed=1)
    for static, x in zip((q, k, v), fresh, strict=True):
        static.copy_(x)
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(out, psa_attention(*fresh, config=config))


def test_other_stream_gives_the_same():
    q, k, v = draw()
    expected = psa_attention(q, k, v)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = psa_attention(q, k, v)
    stream.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_waits_for_the_device(name):
    q, k, v = (x.requires_grad_() for x in draw())

    def run():
        out = psa_attention(q, k, v, config=CONFIGS[name])
        torch.autograd.grad(out, (q, k, v), out.detach())

    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
    names = {event.name for event in profile.events()}
    waits = ("Memcpy DtoH", "cudaMemcpy", "cudaStreamSynchronize", "cudaEventSynchronize")
    assert not [n for n in names if n.startswith(waits)], names


def test_more_than_2_to_the_31_elements():
    """Heads past the 32-bit offsets are computed like those before them."""
    heads, length, head_dim = 136, 131_072, 128
    assert heads * length * head_dim > 2**31
    generator = torch.Generator("cuda").manual_seed(0)
    one = torch.randn(
        3, 1, 1, length, head_dim, device="cuda", dtype=torch.bfloat16, generator=generator
    )
    q, k, v = (x.repeat(1, heads, 1, 1) for x in one)
    levels = torch.zeros(1, 1, length // 128, length // 64, dtype=torch.int32, device="cuda")
    levels[..., ::64] = 1
    levels[..., 1::32] = 8
    kwargs = {"block_m": 128, "block_n": 64, "implementation": "triton"}
    expected = sparse_attention(*one, levels, **kwargs)
    out = sparse_attention(q, k, v, levels.expand(1, heads, -1, -1), **kwargs)
    for head in (0, heads // 2, heads - 1):
        assert torch.equal(out[:, head], expected[:, 0])
