"""The implementations of attention by name, and which of them runs."""

import importlib.util
import logging
from typing import Protocol

from torch import Tensor

from psa_torch._dispatch import announce
from psa_torch._eager import is_eager
from psa_torch.attention import gather
from shared_specs import dispatch


class Implementation(Protocol):
    """What an entry of `IMPLEMENTATIONS` provides; a module with these functions will do.

    `levels` is dense int32 `[B, H, Nq, Nk]`; lse is float32 (float64 for float64), natural log,
    -inf on rows that see nothing.
    """

    def unsupported(
        self, q: Tensor, k: Tensor, v: Tensor, block_m: int, block_n: int
    ) -> str | None:
        """Why it cannot run on this input, or None if it can."""
        ...

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        levels: Tensor,
        *,
        block_m: int,
        block_n: int,
        scale: float,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor]:
        """out and lse, in fresh contiguous memory."""
        ...

    def backward(
        self,
        dout: Tensor,
        dlse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        levels: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        block_m: int,
        block_n: int,
        scale: float,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk and dv, in fresh contiguous memory."""
        ...


class _Triton:
    """`psa_torch.attention.triton`, imported when it is first used: Triton may be absent."""

    @staticmethod
    def unsupported(q: Tensor, k: Tensor, v: Tensor, block_m: int, block_n: int) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed (pip install triton)"
        from psa_torch.attention import triton

        return triton.unsupported(q, k, v, block_m, block_n)

    @staticmethod
    def forward(*args, **kwargs) -> tuple[Tensor, Tensor]:
        from psa_torch.attention import triton

        return triton.forward(*args, **kwargs)

    @staticmethod
    def backward(*args, **kwargs) -> tuple[Tensor, Tensor, Tensor]:
        from psa_torch.attention import triton

        return triton.backward(*args, **kwargs)


COST_ON_A_GPU = (
    "It is slower there: it copies the rows it reads for every query block, makes the host wait "
    "for the device in every call, and cannot be captured in a CUDA graph"
)

IMPLEMENTATIONS: dict[str, Implementation] = {"triton": _Triton(), "gather": gather}
"""Best first: what runs by itself is the first that can."""

MAX_CHOSEN = 1024

_chosen: dict[tuple, str] = {}
"""What runs on a GPU, by all that it depends on."""


def choose(
    implementation: str | None, q: Tensor, k: Tensor, v: Tensor, *, block_m: int, block_n: int
) -> str:
    """Name of the implementation that runs.

    Args:
        implementation: a key of `IMPLEMENTATIONS`, used or refused; or None: `triton` for CUDA
            tensors that it supports, else `gather`. That choice is logged once with its reason
            (logger `psa_torch`, level info; `gather` on a GPU at level warning, with the cost).

    Raises:
        ValueError: the name is unknown, or what was chosen cannot run on this input.
    """
    if not (type(q) is Tensor and q.is_cuda and is_eager(q, k, v)):
        return _choose(implementation, q, k, v, block_m, block_n)
    shapes = q.shape, k.shape, v.shape
    key = implementation, shapes, q.dtype, q.get_device(), block_m, block_n
    name = _chosen.get(key)
    if name is None:
        if len(_chosen) >= MAX_CHOSEN:
            _chosen.clear()
        name = _chosen[key] = _choose(implementation, q, k, v, block_m, block_n)
    return name


def _choose(
    implementation: str | None, q: Tensor, k: Tensor, v: Tensor, block_m: int, block_n: int
) -> str:
    where = q.device.type

    def reason_against(name: str) -> str | None:
        if implementation is None and name == "triton" and not q.is_cuda:
            return f"q is on {where}, not cuda"
        return IMPLEMENTATIONS[name].unsupported(q, k, v, block_m, block_n)

    chosen, passed_over = dispatch.choose(implementation, IMPLEMENTATIONS, reason_against)
    if implementation is None and passed_over and q.is_cuda:
        why = f"{passed_over}. {COST_ON_A_GPU}"
        announce("attention runs as %r: %s", chosen, why, level=logging.WARNING)
    elif implementation is None:
        announce("attention runs as %r: %s", chosen, passed_over or f"q is on {where}")
    return chosen
