"""Tile sizes of every kernel, by GPU, head dimension and dtype. Looked up, never tuned at run time.

Shared memory and registers bound every entry; `tests/gates` compiles all of them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from psa_torch.kernels._launch import capability

HEAD_DIMS = (32, 64, 128, 256)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class ForwardConfig:
    """Forward kernel: `rows` queries (a divisor of block_m) by `tile` pooled keys a step.

    tail: pooled keys a step in the masked tail.
    contiguous: read level-1 blocks as they lie in memory where block_n holds a whole tile.
    """

    rows: int
    tile: int
    tail: int
    warps: int
    stages: int
    contiguous: bool = True


@dataclass(frozen=True, kw_only=True)
class HopperForwardConfig:
    """Warp-specialised forward for compute capability 9.0: 128 queries by `tile` pooled keys.

    slots: tiles of keys and of values in flight.
    multiply_registers, copy_registers: per thread of each role, multiples of 8; two multiplying
        warpgroups and one that copies share 504.
    """

    tile: int
    slots: int
    multiply_registers: int = 232
    copy_registers: int = 40


@dataclass(frozen=True, kw_only=True)
class QueryGradConfig:
    """dq kernel: `rows` queries (a divisor of block_m) by `tile` pooled keys a step.

    tail: pooled keys a step in the masked tail.
    """

    rows: int
    tile: int
    tail: int
    warps: int
    stages: int


@dataclass(frozen=True, kw_only=True)
class KeyGradConfig:
    """dk/dv kernel of one level: the rows of one key block by `rows` queries a step.

    rows: a divisor of block_m.
    """

    rows: int
    warps: int
    stages: int


@dataclass(frozen=True, kw_only=True)
class BackwardConfig:
    """All of the backward; `key` has one entry per level, finest first."""

    query: QueryGradConfig
    key: tuple[KeyGradConfig, KeyGradConfig, KeyGradConfig, KeyGradConfig]


def forward_config(q: Tensor, block_m: int, block_n: int) -> ForwardConfig:
    """The forward's tile sizes for `q` `[B, H, Lq, D]`."""
    return choose_forward(capability(q), q.shape[-1], _register_dtype(q), block_m, block_n)


def backward_config(q: Tensor, block_m: int, block_n: int) -> BackwardConfig:
    """The backward's tile sizes for `q` `[B, H, Lq, D]`."""
    return choose_backward(capability(q), q.shape[-1], _register_dtype(q), block_m, block_n)


def rows_contiguous(x: Tensor) -> Tensor:
    """`x` itself if its last dimension is dense, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _register_dtype(q: Tensor) -> torch.dtype:
    """The interpreter has no registers to save and likes few large tiles, whatever the dtype."""
    return q.dtype if q.is_cuda else torch.bfloat16


def choose_forward(
    capability: tuple[int, int], head_dim: int, dtype: torch.dtype, block_m: int, block_n: int
) -> ForwardConfig:
    """Forward tile sizes; `capability` is the compute capability of the GPU."""
    if dtype == torch.float32:
        return ForwardConfig(rows=16, tile=16, tail=16, warps=4, stages=1)
    return ForwardConfig(rows=block_m, tile=128, tail=64, warps=8, stages=3)


def choose_backward(
    capability: tuple[int, int], head_dim: int, dtype: torch.dtype, block_m: int, block_n: int
) -> BackwardConfig:
    """Backward tile sizes; `capability` is the compute capability of the GPU."""
    if dtype == torch.float32:
        return BackwardConfig(
            query=QueryGradConfig(rows=16, tile=16, tail=16, warps=4, stages=1),
            key=(KeyGradConfig(rows=16, warps=8, stages=1),) * 4,
        )
    return BackwardConfig(
        query=QueryGradConfig(rows=block_m, tile=64, tail=32, warps=8, stages=3),
        key=(KeyGradConfig(rows=64, warps=4, stages=2),)
        + (KeyGradConfig(rows=block_m, warps=8, stages=2),) * 3,
    )
