"""Conformance adapters of this package's implementations: `psa conformance run
psa_jax.conformance:gather`, or `:mosaic`."""

import contextlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from psa_jax import importance, order, selection, table
from psa_jax.attention import IMPLEMENTATIONS, sparse_attention
from shared_specs.config import PSAConfig
from shared_specs.conformance.adapter import Adapter


class JaxAdapter(Adapter):
    """One implementation on one platform.

    Args:
        implementation: a key of `psa_jax.attention.IMPLEMENTATIONS`.
        platform: 'cpu' or 'gpu'.
        context: what calls run in, a function that makes a context manager; for an interpreter.
    """

    def __init__(self, implementation: str, platform: str = "cpu", context=contextlib.nullcontext):
        self.name = f"jax {implementation} on {platform}"
        self.implementation, self.platform, self.context = implementation, platform, context

    def _device(self):
        return jax.devices(self.platform)[0]

    def _array(self, x: np.ndarray, dtype: str | None = None) -> jax.Array:
        wanted = x.dtype if dtype is None else jnp.dtype(dtype)
        return jax.device_put(np.asarray(x).astype(wanted), self._device())

    def unavailable(self) -> str | None:
        """Why the implementation cannot run on the platform at all, or None."""
        try:
            self._device()
        except RuntimeError:
            return f"jax sees no {self.platform} device"
        probe = self._array(np.zeros((1, 1, 128, 64), np.float32), "bfloat16")
        with self.context():
            return IMPLEMENTATIONS[self.implementation].unsupported(probe, probe, probe, 128, 64)

    def capabilities(self) -> Mapping[str, Any]:
        without = {"lengths": {False}}
        if self.implementation == "mosaic":
            return {"dtype": {"float16", "bfloat16"}, **without}
        return without

    def scores(self, q: np.ndarray, k: np.ndarray, config: PSAConfig) -> np.ndarray:
        """float32 scores of float32 inputs."""
        return np.asarray(importance.block_scores(self._array(q), self._array(k), config))

    def select(self, scores, config, *, q_len, kv_len, cap):
        cap = None if cap is None else self._array(cap)
        scores = self._array(scores)
        levels = selection.select_levels(scores, config, q_len=q_len, kv_len=kv_len, cap=cap)
        return np.asarray(levels)

    def table(self, levels, *, transposed):
        return tuple(map(np.asarray, table.build_table(self._array(levels), transposed=transposed)))

    def forward(self, q, k, v, levels, *, dtype, **call):
        with self._precision(dtype), self.context():
            q, k, v = (self._array(x, dtype) for x in (q, k, v))
            self._refuse(q, k, v, call)
            answer = self._attend(call)(q, k, v, self._array(levels))
        return tuple(np.asarray(x, np.float64) for x in answer)

    def backward(self, q, k, v, levels, dout, dlse, *, dtype, **call):
        with self._precision(dtype), self.context():
            q, k, v = (self._array(x, dtype) for x in (q, k, v))
            self._refuse(q, k, v, call)
            levels = self._array(levels)
            attend = self._attend(call)
            answer, pull = jax.vjp(lambda q, k, v: attend(q, k, v, levels), q, k, v)
            dlse = np.zeros(answer[1].shape) if dlse is None else dlse
            grads = pull((self._array(dout, dtype), self._array(dlse, str(answer[1].dtype))))
        return tuple(np.asarray(x, np.float64) for x in grads)

    def order(self, method, grid: Any, tile: Any):
        made = order.gilbert_order(grid) if method == "Gilbert" else order.sta_order(grid, tile)
        return np.asarray(made)

    def dense(self, q, k, v, dout, *, scale, is_causal, dtype) -> tuple[np.ndarray, ...]:
        """out, dq, dk, dv of `jax.nn.dot_product_attention`, the yardstick of `psa parity`."""

        def attend(q, k, v):
            q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
            out = jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=is_causal)
            return out.swapaxes(1, 2)

        with jax.default_matmul_precision("highest"):
            q, k, v = (self._array(x, dtype) for x in (q, k, v))
            out, pull = jax.vjp(attend, q, k, v)
            return tuple(np.asarray(x, np.float64) for x in (out, *pull(self._array(dout, dtype))))

    def _attend(self, call):
        return jax.jit(
            lambda q, k, v, levels: sparse_attention(
                q, k, v, levels, implementation=self.implementation, return_lse=True, **call
            )
        )

    def _precision(self, dtype: str):
        return jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()

    def _refuse(self, q, k, v, call) -> None:
        """What an implementation says it cannot run is a skip, not a failure."""
        module = IMPLEMENTATIONS[self.implementation]
        reason = module.unsupported(q, k, v, call["block_m"], call["block_n"])
        if reason:
            raise NotImplementedError(reason)


def adapters(device: str) -> list[JaxAdapter]:
    """Every implementation, for 'cpu' or 'gpu'."""
    return [JaxAdapter(name, device) for name in IMPLEMENTATIONS]


def _best_platform() -> str:
    return "gpu" if jax.default_backend() in ("gpu", "cuda") else "cpu"


gather = JaxAdapter("gather", _best_platform())
mosaic = JaxAdapter("mosaic", _best_platform())
