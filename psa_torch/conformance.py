"""Conformance adapters of this package's implementations: `psa conformance run
psa_torch.conformance:gather`, or `:triton`."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from psa_torch import importance, order, selection, table
from psa_torch.attention import IMPLEMENTATIONS, sparse_attention
from shared_specs.config import PSAConfig
from shared_specs.conformance.adapter import Adapter


class TorchAdapter(Adapter):
    """One implementation on one device.

    Args:
        implementation: a key of `psa_torch.attention.IMPLEMENTATIONS`.
        device: where tensors are placed.
    """

    def __init__(self, implementation: str, device: str = "cpu"):
        self.name = f"torch {implementation} on {device}"
        self.implementation, self.device = implementation, torch.device(device)

    def _tensor(self, x: np.ndarray, dtype: str | None = None) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(x)).to(self.device)
        return tensor if dtype is None else tensor.to(getattr(torch, dtype))

    def unavailable(self) -> str | None:
        """Why the implementation cannot run on the device at all, or None."""
        if self.device.type == "cuda" and not torch.cuda.is_available():
            return "torch sees no CUDA device"
        probe = torch.zeros(1, 1, 128, 64, dtype=torch.float16, device=self.device)
        return IMPLEMENTATIONS[self.implementation].unsupported(probe, probe, probe, 128, 64)

    def capabilities(self) -> Mapping[str, Any]:
        if self.implementation != "triton":
            return {}
        return {"dtype": {"float32", "float16", "bfloat16"}}

    def scores(self, q: np.ndarray, k: np.ndarray, config: PSAConfig) -> np.ndarray:
        """float32 scores of float32 inputs."""
        return importance.block_scores(self._tensor(q), self._tensor(k), config).cpu().numpy()

    def select(self, scores, config, *, q_len, kv_len, cap):
        cap = None if cap is None else self._tensor(cap)
        levels = selection.select_levels(
            self._tensor(scores), config, q_len=q_len, kv_len=kv_len, cap=cap
        )
        return levels.cpu().numpy()

    def table(self, levels, *, transposed):
        entries, counts = table.build_table(self._tensor(levels), transposed=transposed)
        return entries.cpu().numpy(), counts.cpu().numpy()

    def forward(self, q, k, v, levels, *, dtype, **call):
        q, k, v = (self._tensor(x, dtype) for x in (q, k, v))
        self._refuse(q, k, v, call)
        out, lse = self._attend(q, k, v, levels, call)
        return out.double().cpu().numpy(), lse.double().cpu().numpy()

    def backward(self, q, k, v, levels, dout, dlse, *, dtype, **call):
        q, k, v = (self._tensor(x, dtype).requires_grad_() for x in (q, k, v))
        self._refuse(q, k, v, call)
        out, lse = self._attend(q, k, v, levels, call)
        heads, grads = [out], [self._tensor(dout, dtype)]
        if dlse is not None:
            heads, grads = [out, lse], [*grads, self._tensor(dlse).to(lse.dtype)]
        found = torch.autograd.grad(heads, (q, k, v), grads)
        return tuple(x.double().cpu().numpy() for x in found)

    def _attend(self, q, k, v, levels, call) -> tuple[torch.Tensor, torch.Tensor]:
        settings: dict[str, Any] = {
            name: self._tensor(x) if isinstance(x, np.ndarray) else x for name, x in call.items()
        }
        settings |= {"implementation": self.implementation}
        return sparse_attention(q, k, v, self._tensor(levels), return_lse=True, **settings)

    def order(self, method, grid: Any, tile: Any):
        made = order.gilbert_order(grid) if method == "Gilbert" else order.sta_order(grid, tile)
        return np.asarray(made)

    def dense(self, q, k, v, dout, *, scale, is_causal, dtype) -> tuple[np.ndarray, ...]:
        """out, dq, dk, dv of `scaled_dot_product_attention`, the yardstick of `psa parity`."""
        q, k, v = (self._tensor(x, dtype).requires_grad_() for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, scale=scale, is_causal=is_causal, enable_gqa=q.shape[1] != k.shape[1]
        )
        grads = torch.autograd.grad(out, (q, k, v), self._tensor(dout, dtype))
        return tuple(x.detach().double().cpu().numpy() for x in (out, *grads))

    def _refuse(self, q, k, v, call) -> None:
        """What an implementation says it cannot run is a skip, not a failure."""
        module = IMPLEMENTATIONS[self.implementation]
        reason = module.unsupported(q, k, v, call["block_m"], call["block_n"])
        if reason:
            raise NotImplementedError(reason)


def adapters(device: str) -> list[TorchAdapter]:
    """Every implementation, for 'cpu' or 'gpu'."""
    place = "cuda" if device == "gpu" else "cpu"
    return [TorchAdapter(name, place) for name in IMPLEMENTATIONS]


gather = TorchAdapter("gather", "cuda" if torch.cuda.is_available() else "cpu")
triton = TorchAdapter("triton", "cuda" if torch.cuda.is_available() else "cpu")
