"""JAX providers: chunked dense, cuDNN, and psa_jax whole and in parts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import host_seconds, seconds
from benchmarks.session import DENSE, GIVEN, PART, WHOLE, Provider
from benchmarks.workloads import BACKWARD, FORWARD, Workload
from shared_specs.tools.demo.baselines import chunked_dense

# Runs dispatched one after the other before waiting, so that the host's part of a run hides
# behind the device's: at least this long in all.
CHAIN_SECONDS = 0.05


class JaxSession:
    """One workload on JAX (see `benchmarks.session.Session`)."""

    def __init__(self, workload: Workload, inputs: dict[str, np.ndarray]):
        from psa_jax import importance, selection

        self.workload = workload
        try:
            self.device = jax.devices(workload.device)[0]
        except RuntimeError as error:
            raise ValueError(f"JAX has no {workload.device}: {error}") from error
        self.q, self.k, self.v, self.dout = (
            jax.device_put(jnp.asarray(inputs[name], workload.dtype), self.device)
            for name in ("q", "k", "v", "dout")
        )
        config = workload.config
        self.lengths = {"q_len": workload.length, "kv_len": workload.length}
        self._score = jax.jit(lambda q, k: importance.block_scores(q, k, config))
        self._select = jax.jit(
            lambda scores: selection.select_levels(scores, config, **self.lengths)
        )
        self.scores = self._score(self.q, self.k)
        self.levels = self._select(self.scores)
        self._compiled: Any = None

    def providers(self) -> list[Provider]:
        from psa_jax.attention import IMPLEMENTATIONS

        gpu = self.workload.device == "gpu"
        # On a GPU `gather` is a reference, not a contender, and its runs take most of the time.
        names = [name for name in IMPLEMENTATIONS if not (gpu and name == "gather")]
        dense = self._cudnn() if gpu else self._chunked()
        found = [dense, *(self._given(name) for name in names), self._whole()]
        return found + self._parts()

    def numpy(self, x, heads):
        return np.asarray(x[:, np.asarray(heads)].astype(jnp.float32))

    def wait(self, x):
        jax.block_until_ready(x)

    def times(self, call, repeats):
        self.wait(call())
        once = seconds(lambda: self.wait(call()))
        chain = 1
        if self.workload.device == "gpu":
            chain = max(1, round(CHAIN_SECONDS / once))

        def run() -> None:
            for _ in range(chain - 1):
                call()
            self.wait(call())

        return [seconds(run) / chain for _ in range(repeats)]

    def host_seconds(self, call, repeats):
        if self.workload.device == "cpu":
            return None
        return host_seconds(call, self.wait, repeats)

    def peak_bytes(self, call):
        """From the compiled program's own account: temporaries and outputs."""
        stats = getattr(call, "compiled", None) and call.compiled.memory_analysis()
        if not stats:
            return None
        return stats.temp_size_in_bytes + stats.output_size_in_bytes

    def _passes(
        self, attend: Callable[..., Any], inputs: tuple, dout: Any, *extra: Any
    ) -> Callable[[str], Callable[[], Any]]:
        """A builder of the three passes of `attend(q, k, v, *extra)`."""

        def gradients(inputs, dout, *extra):
            return jax.vjp(lambda *x: attend(*x, *extra), *inputs)[1](dout)

        def build(which: str) -> Callable[[], Any]:
            if which == FORWARD:
                return Compiled(attend, *inputs, *extra)
            if which == BACKWARD:
                # `extra` goes in as an argument: as a constant, XLA would fold sorts of it.
                forward = jax.jit(lambda extra, *x: jax.vjp(lambda *y: attend(*y, *extra), *x))
                return Compiled(lambda pull, dout: pull(dout), forward(extra, *inputs)[1], dout)
            return Compiled(gradients, inputs, dout, *extra)

        return build

    def _chunked(self) -> Provider:
        def attend(q, k, v):
            if self.workload.config.causal:
                raise ValueError("the chunked dense baseline has no causal mask")
            return chunked_dense(q, k, v)

        build = self._passes(attend, (self.q, self.k, self.v), self.dout)
        return Provider(name="jax-dense-chunked", kind=DENSE, build=build)

    def _cudnn(self) -> Provider:
        # cuDNN's own layout, so that no transposition is timed.
        inputs = tuple(x.swapaxes(1, 2) for x in (self.q, self.k, self.v))
        attend = functools.partial(
            jax.nn.dot_product_attention,
            implementation="cudnn",
            is_causal=self.workload.config.causal,
        )
        return Provider(
            name="jax-cudnn",
            kind=DENSE,
            build=self._passes(attend, inputs, self.dout.swapaxes(1, 2)),
            output=lambda out: out.swapaxes(1, 2),
        )

    def _given(self, implementation: str) -> Provider:
        from psa_jax.attention import sparse_attention

        config = self.workload.config

        def attend(q, k, v, levels):
            return sparse_attention(
                q,
                k,
                v,
                levels,
                block_m=config.block_m,
                block_n=config.block_n,
                scale=config.scale,
                is_causal=config.causal,
                rest=config.rest,
                implementation=implementation,
            )

        return Provider(
            name=f"jax-psa-{implementation}",
            kind=GIVEN,
            build=self._passes(attend, (self.q, self.k, self.v), self.dout, self.levels),
            levels=lambda: np.asarray(self.levels),
            block_n=config.block_n,
        )

    def _whole(self) -> Provider:
        def attend(q, k, v):
            from psa_jax import psa_attention

            return psa_attention(q, k, v, config=self.workload.config)

        return Provider(
            name="jax-psa-whole",
            kind=WHOLE,
            build=self._passes(attend, (self.q, self.k, self.v), self.dout),
            levels=lambda: np.asarray(self.levels),
            block_n=self.workload.config.block_n,
        )

    def _parts(self) -> list[Provider]:
        from psa_jax import pyramid, table

        config = self.workload.config
        # What a forward call makes: kernels read level 1 from the keys and values themselves.
        gpu = self.workload.device == "gpu"
        pool = pyramid.pool_levels if gpu else pyramid.build_pyramid
        rooms = {
            "pyramid": (lambda k, v: pool(k, v, config.block_n), self.k, self.v),
            "scores": (self._score, self.q, self.k),
            "selection+table": (lambda s: table.build_table(self._select(s)), self.scores),
        }
        return [
            Provider(
                name=f"jax-part-{room}",
                kind=PART,
                build=lambda which, work=work: Compiled(*work),
            )
            for room, work in rooms.items()
        ]


class Compiled:
    """A compiled call with its arguments bound; `compiled` is what XLA made of it."""

    def __init__(self, function: Callable[..., Any], *args: Any):
        self.compiled = jax.jit(function).lower(*args).compile()
        self._args = args

    def __call__(self) -> Any:
        return self.compiled(*self._args)
