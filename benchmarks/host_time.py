"""What an eager call costs the host, on a CUDA device: `python -m benchmarks.host_time`.

First it is checked that repeated launches (see `psa_torch/_triton/launch.py`) give what Triton's
own give, bit for bit. Then, for each length and provider, in milliseconds:

    host    until the call returns; the device is waited for between batches
    eager   of one call of many made one after the other, the wait at the end included
    device  of one call in a CUDA graph
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import pstats
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import psa_torch
from psa_torch.attention.ops import attention_backward, attention_forward
from psa_torch.choice import choose_levels
from shared_specs import PSAConfig

BATCH, BATCHES = 20, 21


def draw(heads: int, length: int, head_dim: int, *, offset: int = 0) -> tuple[torch.Tensor, ...]:
    """q, k, v in bfloat16; `offset` elements past where memory starts."""

    size = heads * length * head_dim
    memory = [torch.randn(offset + size, device="cuda").bfloat16() for _ in range(3)]
    return tuple(x[offset:].view(1, heads, length, head_dim) for x in memory)


@contextlib.contextmanager
def as_triton_launches() -> Iterator[None]:
    """Nothing is repeated inside: somebody looks at launches."""

    def look(_) -> None:
        pass

    hook = triton.knobs.runtime.launch_enter_hook
    hook.add(look)
    try:
        yield
    finally:
        hook.remove(look)


CHECKED = {
    "contiguous": 0,
    "not of whole rows": 8,
    "not aligned": 1,
    "heads inside rows": None,
}
"""Elements past where memory starts; None: strided. Other configurations, shapes and dtypes are in
`tests/gpu/test_launch.py`: each takes the compiler a while."""


def check(heads: int, head_dim: int, length: int = 1024) -> None:
    """Raise AssertionError where a repeated call differs from one that Triton launches."""
    kept = []
    for name, offset in CHECKED.items():
        for seed in range(5):  # seen, recorded, then repeated with other memory
            torch.manual_seed(seed)
            inputs = draw(heads, length, head_dim, offset=offset or 0)
            if offset is None:
                inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
            dout = torch.randn_like(inputs[0])
            kept.append((inputs, dout))  # so that every call gets memory of its own

            def run(inputs=inputs, dout=dout):
                leaves = [x.detach().requires_grad_() for x in inputs]
                out = psa_torch.psa_attention(*leaves)
                with torch.no_grad():
                    plain = psa_torch.psa_attention(*inputs)
                return out, plain, *torch.autograd.grad(out, leaves, dout)

            found = run()
            with as_triton_launches():
                want = run()
            same = [torch.equal(a, b) for a, b in zip(found, want, strict=True)]
            assert all(same), (name, seed, same)
            assert all(x.isfinite().all() for x in found), (name, seed)
        print(f"repeated launches give what Triton's own give: {name}", flush=True)


def host_ms(call: Callable) -> float:
    """Time until a call returns: of the quickest half of the batches the median, since a shared
    host takes time away."""
    for _ in range(5):
        call()
    times = []
    for _ in range(BATCHES):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(BATCH):
            call()
        times.append((time.perf_counter() - start) / BATCH)
    torch.cuda.synchronize()
    return statistics.median(sorted(times)[: (BATCHES + 1) // 2]) * 1e3


def eager_ms(call: Callable, calls: int = 50) -> float:
    """Median time of a call among many."""
    times = []
    for _ in range(7):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times) * 1e3


def device_ms(call: Callable) -> float:
    """Median time of a call in a graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(15):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def providers(heads: int, length: int, head_dim: int) -> dict[str, Callable]:
    """Calls by name."""
    q, k, v = draw(heads, length, head_dim)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    dout = torch.randn_like(q)
    config = PSAConfig()
    levels = choose_levels(q, k, config).levels
    blocks = dict(block_m=config.block_m, block_n=config.block_n)

    def cudnn(*x):
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(*x)

    def given(*x):
        return psa_torch.sparse_attention(*x, levels, **blocks)

    forwards = {
        "sdpa": scaled_dot_product_attention,
        "cudnn": cudnn,
        "psa": psa_torch.psa_attention,
        "psa, levels given": given,
    }

    def without_gradient(forward):
        def call():
            with torch.no_grad():
                forward(q, k, v)

        return call

    def with_gradient(forward):
        def call():
            torch.autograd.grad(forward(*leaves), leaves, dout)

        return call

    found = {name: without_gradient(forward) for name, forward in forwards.items()}
    return found | {
        f"{name}, forward and backward": with_gradient(f) for name, f in forwards.items()
    }


def parts(heads: int, length: int, head_dim: int) -> dict[str, Callable]:
    """What a call is made of, by name."""
    q, k, v = draw(heads, length, head_dim)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    dout = torch.randn_like(q)
    config = PSAConfig()
    levels = choose_levels(q, k, config).levels
    settings = (None, config.block_m, config.block_n, head_dim**-0.5, False, config.rest)
    # The functions that the operators were made of.
    forward = attention_forward._init_fn
    backward = attention_backward._init_fn
    out, lse = forward(q, k, v, levels, *settings)

    class Empty(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            return torch.empty_like(q)

        @staticmethod
        def backward(ctx, dout):
            return torch.empty_like(dout), torch.empty_like(dout), torch.empty_like(dout)

    return {
        "memory for q": lambda: torch.empty_like(q),
        "a Python function with a gradient that allocates only": lambda: torch.autograd.grad(
            Empty.apply(*leaves), leaves, dout
        ),
        "kernels of the forward": lambda: forward(q, k, v, levels, *settings),
        "forward for a gradient": lambda: psa_torch.sparse_attention(
            *leaves, levels, block_m=config.block_m, block_n=config.block_n
        ),
        "kernels of the backward": lambda: backward(
            dout, None, q, k, v, levels, out, lse, *settings
        ),
    }


def breakdown(call: Callable, title: str, rows: int = 40) -> None:
    """Print where the host spends a call."""
    for _ in range(5):
        call()
    torch.cuda.synchronize()
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(200):
        call()
    profile.disable()
    torch.cuda.synchronize()
    print(f"\n{title}, 200 calls")
    pstats.Stats(profile).sort_stats("tottime").print_stats(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--no-check", action="store_true", help="only time")
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    options = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__, end=" ")
    print("triton", triton.__version__, flush=True)
    if not options.no_check:
        check(options.heads, options.head_dim)
    print(f"{'length':>7} {'provider':40} {'host':>8} {'eager':>8} {'device':>8}", flush=True)
    for length in options.lengths:
        calls = providers(options.heads, length, options.head_dim)
        # This package first: it is what the rest is there to be compared with.
        for name, call in sorted(calls.items(), key=lambda x: not x[0].startswith("psa")):
            try:
                device = "" if "backward" in name else f"{device_ms(call):8.3f}"
                host, eager = host_ms(call), eager_ms(call)
            except RuntimeError as error:
                print(f"{length:7} {name:40} skipped: {str(error).splitlines()[0][:80]}")
                continue
            print(f"{length:7} {name:40} {host:8.3f} {eager:8.3f} {device}", flush=True)
        with as_triton_launches():
            for name in ("psa", "psa, levels given"):
                host = host_ms(calls[name])
                print(f"{length:7} {name + ', launched by Triton':40} {host:8.3f}", flush=True)
    if options.profile:
        for name, call in parts(options.heads, 4096, options.head_dim).items():
            print(f"{4096:7} {name:55} {host_ms(call):8.3f}", flush=True)
        calls = providers(options.heads, 4096, options.head_dim)
        for name in ("psa", "psa, levels given, forward and backward"):
            breakdown(calls[name], name)


if __name__ == "__main__":
    main()
