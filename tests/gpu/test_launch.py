"""Repeated launches on a CUDA device: they are the launches that Triton makes."""

import contextlib
import gc
import threading

import pytest
import torch

pytest.importorskip("triton")
import triton  # noqa: E402

from psa_torch import psa_attention, sparse_attention  # noqa: E402
from psa_torch._triton import launch  # noqa: E402
from psa_torch._triton.recording import Plan  # noqa: E402
from psa_torch.choice import choose_levels  # noqa: E402
from shared_specs import PSAConfig  # noqa: E402

pytestmark = pytest.mark.gpu

DEVICES = torch.cuda.device_count() if torch.cuda.is_available() else 0


def draw(seed=0, *, heads=4, length=2048, head_dim=64, device="cuda", dtype=torch.bfloat16):
    generator = torch.Generator(device).manual_seed(seed)
    shape = (1, heads, length, head_dim)
    return [torch.randn(shape, device=device, dtype=dtype, generator=generator) for _ in range(3)]


@contextlib.contextmanager
def watched():
    """Names of the kernels launched inside; nothing is repeated meanwhile."""
    names = []

    def see(metadata):
        names.append(metadata.get()["name"])

    triton.knobs.runtime.launch_enter_hook.add(see)
    try:
        yield names
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(see)


def run(q, k, v, **options):
    """out and gradients."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = psa_attention(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)]


def expected(*inputs, **options):
    with watched() as names:
        found = run(*inputs, **options)
    assert len(names) > 6
    return found


def equal(found, want):
    return all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@pytest.fixture
def repeats(monkeypatch):
    """Counts the calls that were repeated."""
    counts = []
    plain = Plan.run

    def counted(self, *args):
        counts.append(self)
        return plain(self, *args)

    monkeypatch.setattr(Plan, "run", counted)
    return counts


CONFIGS = {
    "default": PSAConfig(),
    "causal": PSAConfig(causal=True, block_n=32, sink_blocks=1),
    "thresholdbound": PSAConfig(mask_mode="thresholdbound", block_n=128),
    "antidiagonal": PSAConfig(importance="antidiagonal"),
}


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("name", CONFIGS)
def test_other_memory(name, head_dim, repeats):
    kept = [draw(seed, head_dim=head_dim) for seed in range(6)]
    for inputs in kept:
        want = expected(*inputs, config=CONFIGS[name])
        assert equal(run(*inputs, config=CONFIGS[name]), want)
    assert len(repeats) >= 2 * 4  # forward and backward, from the third call on


@pytest.mark.parametrize("offset", [0, 1, 8, 64, 72, 256])
def test_alignment(offset):
    """Elements past where memory starts: 16 bytes are 8."""
    for seed in range(4):
        inputs = []
        for x in draw(seed, head_dim=128):
            memory = torch.empty(x.numel() + offset, device="cuda", dtype=x.dtype)
            inputs.append(memory[offset:].view_as(x).copy_(x))
        assert equal(run(*inputs), expected(*inputs))


def test_strides_and_shared_memory():
    """Slices of one tensor, as models project q, k and v at once."""
    for seed in range(4):
        generator = torch.Generator("cuda").manual_seed(seed)
        shape = (1, 2048, 3, 4, 64)
        qkv = torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator)
        inputs = qkv.transpose(1, 3).unbind(2)
        assert equal(run(*inputs), expected(*inputs))
        same = (inputs[0],) * 3
        assert equal(run(*same), expected(*same))


def test_lengths_come_and_go():
    for _ in range(4):
        for length in (640, 641, 1024, 1300):
            inputs = draw(length, length=length)
            assert equal(run(*inputs), expected(*inputs))


def test_other_streams(repeats):
    inputs = draw()
    want = [run(*draw(seed)) for seed in range(5)]
    streams = [torch.cuda.Stream() for _ in range(5)]
    torch.cuda.synchronize()
    before, found = len(repeats), []
    for seed, stream in enumerate(streams):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # what runs on another stream would be done before
            mine = [
                x.copy_(y) for x, y in zip(map(torch.empty_like, inputs), draw(seed), strict=True)
            ]
            found.append(run(*mine))
    torch.cuda.synchronize()
    assert len(repeats) > before
    assert all(equal(a, b) for a, b in zip(found, want, strict=True))


def test_capture(repeats):
    for seed in range(3):
        run(*draw(seed))
    static = draw(0)
    want = expected(*draw(7))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(*static)
    stream.synchronize()
    before, graph = len(repeats), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = psa_attention(*static)
    assert len(repeats) > before
    # Memory that the graph does not own is overwritten between its replays.
    for seed in range(3):
        psa_attention(*draw(seed + 10))
    for x, y in zip(static, draw(7), strict=True):
        x.copy_(y)
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(out, want[0])


@pytest.mark.skipif(DEVICES < 2, reason="needs two CUDA devices")
def test_two_devices():
    for seed in range(4):
        found = []
        for index in range(2):  # whichever is current
            found.append(run(*(x.to(f"cuda:{index}") for x in draw(seed, device="cuda:0"))))
            assert all(x.get_device() == index for x in found[-1])
        assert torch.cuda.current_device() == 0
        assert equal([x.to("cuda:0") for x in found[1]], found[0])


def test_threads():
    """Each thread has a stream of its own."""
    wants = [run(*draw(seed)) for seed in range(8)]
    torch.cuda.synchronize()
    failures, start = [], threading.Barrier(8)

    def work(seed):
        try:
            inputs = draw(seed)
            torch.cuda.synchronize()
            start.wait()
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(20):
                    found = run(*inputs)
                torch.cuda.current_stream().synchronize()
            assert equal(found, wants[seed])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


def test_no_memory_is_kept():
    for seed in range(4):
        run(*draw(seed))
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for seed in range(4):
        run(*draw(seed))
    gc.collect()
    assert torch.cuda.memory_allocated() == before


def test_memory_given_back_and_used_by_others():
    """Descriptors are kept by address: whatever lies there next is read."""
    for seed in range(30):
        length = (1024, 2048)[seed % 2]
        filler = torch.empty(seed * 4096 + 1, device="cuda")
        inputs = draw(seed, length=length, head_dim=128)
        assert equal(run(*inputs), expected(*inputs)), seed
        del filler, inputs
        if seed % 7 == 0:
            torch.cuda.empty_cache()


def test_peak_memory_is_that_of_the_calls_themselves():
    def peak(inputs):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(*inputs)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    inputs = draw(length=16_384, heads=8)
    for _ in range(3):
        run(*inputs)
    repeated = peak(inputs)
    with watched():
        plain = peak(inputs)
    assert repeated <= 1.02 * plain


def test_hooks_see_launches():
    inputs = draw()
    for _ in range(3):
        run(*inputs)
    with watched() as names:
        run(*inputs)
    assert len(names) > 6 and not any(name is None for name in names)


def test_compiled_call_is_one_graph(repeats):
    compiled = torch.compile(psa_attention, fullgraph=True)
    for seed in range(4):
        inputs = draw(seed)
        with torch.no_grad():
            assert torch.equal(compiled(*inputs), psa_attention(*inputs))
    assert repeats  # operators of a compiled graph are as cheap inside


def test_levels_given(repeats):
    config = PSAConfig()
    for seed in range(4):
        q, k, v = draw(seed, head_dim=128)
        levels = choose_levels(q, k, config).levels
        blocks = dict(block_m=128, block_n=64)
        found = sparse_attention(q, k, v, levels, **blocks)
        with watched():
            assert torch.equal(found, sparse_attention(q, k, v, levels, **blocks))
            assert torch.equal(found, sparse_attention(q, k, v, levels.long(), **blocks))
        assert torch.equal(found, sparse_attention(q, k, v, levels.long(), **blocks))
    assert repeats


def test_second_derivatives_are_refused():
    q, k, v = (x.requires_grad_() for x in draw())
    for _ in range(3):
        out = psa_attention(q, k, v)
        (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        with pytest.raises(NotImplementedError, match="no second derivatives"):
            dq.sum().backward()


def test_too_many_kinds_of_calls_are_forgotten(monkeypatch):
    monkeypatch.setattr(launch, "MAX_CALLS", 3)
    for length in (128, 256, 384, 512, 640) * 3:
        inputs = draw(length=length)
        assert equal(run(*inputs), expected(*inputs))
