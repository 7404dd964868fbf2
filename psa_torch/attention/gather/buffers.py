"""Memory that the batches of one call share, and the block view of per-row tensors."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from psa_torch.attention.gather.plan import Problem


class Buffers:
    """Named scratch tensors, grown on demand: fresh ones per batch cost more than the products."""

    def __init__(self, p: Problem):
        self._p = p
        self._flat: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """Uninitialised memory of this shape; the contents of an earlier `take` are lost."""
        size = torch.Size(shape).numel()
        if name not in self._flat or self._flat[name].numel() < size:
            self._flat[name] = torch.empty(size, dtype=self._p.dtype, device=self._p.device)
        return self._flat[name][:size].view(shape)

    def gather(self, name: str, pyramid: Tensor, runs: Tensor) -> Tensor:
        """Rows of `[B, Hk, P, D]` that `runs` `[n, r]` names, `[n, r * rows of a run, D]`."""
        n, r = runs.shape
        rows, d = self._p.run_rows, pyramid.shape[-1]
        out = self.take(name, n * r, rows * d)
        torch.index_select(pyramid.view(-1, rows * d), 0, runs.reshape(-1), out=out)
        return out.view(n, r * rows, d)


def query_blocks(p: Problem, x: Tensor, *, value: float = 0.0) -> Tensor:
    """`[B, H, Lq, ...]` as `[B * H * Nq, block_m, ...]`, the last block filled with `value`."""
    x = x.to(p.dtype)
    missing = p.q_blocks * p.block_m - p.q_len
    if missing:
        x = pad(x, (0, 0) * (x.ndim - 3) + (0, missing), value=value)
    return x.reshape(-1, p.block_m, *x.shape[3:])
