"""PyTorch providers: dense backends, FlexAttention, and psa_torch whole and in parts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.binary_masks import FLEX_BLOCK, binary_levels, block_mask
from benchmarks.measure import host_seconds, peak_resident_bytes, seconds
from benchmarks.session import BINARY, DENSE, GIVEN, PART, WHOLE, Provider
from benchmarks.torch_peers import peers
from benchmarks.workloads import BACKWARD, FORWARD, Workload

# Written before each timed run, so that no provider finds its inputs in the L2 cache.
CACHE_BYTES = 256 * 2**20


class TorchSession:
    """One workload on PyTorch (see `benchmarks.session.Session`)."""

    def __init__(self, workload: Workload, inputs: dict[str, np.ndarray]):
        from psa_torch import importance, selection

        self.workload = workload
        self.device = torch.device("cuda" if workload.device == "gpu" else "cpu")
        if workload.device == "gpu" and not torch.cuda.is_available():
            raise ValueError("PyTorch sees no CUDA device")
        dtype = getattr(torch, workload.dtype)
        moved = {
            name: torch.from_numpy(np.ascontiguousarray(x)).to(self.device, dtype)
            for name, x in inputs.items()
        }
        self.q, self.k, self.v, self.dout = (moved[name] for name in ("q", "k", "v", "dout"))
        self.leaves = tuple(x.detach().requires_grad_() for x in (self.q, self.k, self.v))
        self.lengths = {"q_len": workload.length, "kv_len": workload.length}
        with torch.no_grad():
            self.scores = importance.block_scores(self.q, self.k, workload.config)
            self.levels = selection.select_levels(self.scores, workload.config, **self.lengths)

    def providers(self) -> list[Provider]:
        from psa_torch.attention import IMPLEMENTATIONS

        gpu = self.workload.device == "gpu"
        found = [self._dense(backend) for backend in (["cudnn", "flash"] if gpu else ["default"])]
        if gpu:
            found.append(self._flex())
            found += peers(self)
        # On a GPU `gather` is a reference, not a contender, and its runs take most of the time.
        names = [name for name in IMPLEMENTATIONS if not (gpu and name == "gather")]
        found += [self._given(name) for name in names]
        found.append(self._whole())
        return found + self._parts()

    def numpy(self, x, heads):
        return x.detach()[:, heads].float().cpu().numpy()

    def wait(self, x):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def times(self, call, repeats):
        for _ in range(2):
            call()
        self.wait(None)
        if self.device.type == "cpu":
            return [seconds(call) for _ in range(repeats)]
        cache = torch.empty(CACHE_BYTES, dtype=torch.int8, device=self.device)
        events = []
        for _ in range(repeats):
            cache.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events]

    def host_seconds(self, call, repeats):
        if self.device.type == "cpu":
            return None
        return host_seconds(call, self.wait, repeats)

    def peak_bytes(self, call):
        if self.device.type == "cpu":
            return peak_resident_bytes(call)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def _passes(self, attend: Callable[..., torch.Tensor]) -> Callable[[str], Callable[[], Any]]:
        """A builder of the three passes of `attend(q, k, v)`."""

        def build(which: str) -> Callable[[], Any]:
            if which == FORWARD:
                return torch.no_grad()(functools.partial(attend, self.q, self.k, self.v))
            if which == BACKWARD:
                out = attend(*self.leaves)
                return functools.partial(
                    torch.autograd.grad, out, self.leaves, self.dout, retain_graph=True
                )
            return lambda: torch.autograd.grad(attend(*self.leaves), self.leaves, self.dout)

        return build

    def _dense(self, backend: str) -> Provider:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        kernels = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
        grouped = self.workload.heads != self.workload.kv_heads

        def attend(q, k, v):
            call = functools.partial(
                scaled_dot_product_attention,
                q,
                k,
                v,
                is_causal=self.workload.config.causal,
                enable_gqa=grouped,
            )
            if backend == "default":
                return call()
            with sdpa_kernel(kernels[backend]):
                return call()

        name = "torch-sdpa" if backend == "default" else f"torch-sdpa-{backend}"
        return Provider(name=name, kind=DENSE, build=self._passes(attend))

    @functools.cached_property
    def _flex_attend(self) -> Callable[..., torch.Tensor]:
        from torch.nn.attention.flex_attention import flex_attention

        # Fresh: a compiled function kept from another length would be a dynamic-shape one.
        torch._dynamo.reset()
        return functools.partial(
            torch.compile(flex_attention, dynamic=False),
            block_mask=block_mask(self.binary_levels(), self.workload, self.device),
            enable_gqa=self.workload.heads != self.workload.kv_heads,
        )

    def _flex(self) -> Provider:
        def build(which: str) -> Callable[[], Any]:
            return self._passes(self._flex_attend)(which)

        return Provider(
            name="torch-flex",
            kind=BINARY,
            build=build,
            levels=self.binary_levels,
            block_n=FLEX_BLOCK,
        )

    @functools.cached_property
    def _binary_levels(self) -> np.ndarray:
        return binary_levels(self.scores.cpu().numpy(), self.levels.cpu().numpy(), self.workload)

    def binary_levels(self) -> np.ndarray:
        """Levels 0 and 1 on FlexAttention's blocks, at the density of the pyramid mask."""
        return self._binary_levels

    def _given(self, implementation: str) -> Provider:
        from psa_torch.attention import sparse_attention

        config = self.workload.config

        def attend(q, k, v):
            return sparse_attention(
                q,
                k,
                v,
                self.levels,
                block_m=config.block_m,
                block_n=config.block_n,
                scale=config.scale,
                is_causal=config.causal,
                rest=config.rest,
                implementation=implementation,
            )

        return Provider(
            name=f"torch-psa-{implementation}",
            kind=GIVEN,
            build=self._passes(attend),
            levels=lambda: self.levels.cpu().numpy(),
            block_n=config.block_n,
        )

    def _whole(self) -> Provider:
        def attend(q, k, v):
            from psa_torch import psa_attention

            return psa_attention(q, k, v, config=self.workload.config)

        return Provider(
            name="torch-psa-whole",
            kind=WHOLE,
            build=self._passes(attend),
            levels=lambda: self.levels.cpu().numpy(),
            block_n=self.workload.config.block_n,
        )

    def _parts(self) -> list[Provider]:
        from psa_torch import importance, pyramid, selection, table

        config = self.workload.config
        # What a forward call makes: kernels read level 1 from the keys and values themselves.
        gpu = self.workload.device == "gpu"
        pool = pyramid.pool_levels if gpu else pyramid.build_pyramid

        def select() -> Any:
            levels = selection.select_levels(self.scores, config, **self.lengths)
            return table.build_table(levels)

        rooms = {
            "pyramid": lambda: pool(self.k, self.v, config.block_n),
            "scores": lambda: importance.block_scores(self.q, self.k, config),
            "selection+table": select,
        }
        return [
            Provider(
                name=f"torch-part-{room}",
                kind=PART,
                build=lambda which, call=call: torch.no_grad()(call),
            )
            for room, call in rooms.items()
        ]
