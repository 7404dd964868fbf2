"""Tile sizes of every kernel, by GPU, head dimension and dtype. Looked up, never tuned at run time.

Shared memory and registers bound every entry; `tests/gates` compiles all of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from psa_torch.attention.triton import hopper
from psa_torch.kernels._launch import capability

HEAD_DIMS = (32, 64, 128, 256)
"""Columns that kernels multiply; a head dimension in between takes the next (see `columns`)."""
SMALL_HEAD_DIMS = (32, 64, 128)
"""What fits the 99 KiB of shared memory of compute capabilities 8.6, 8.9 and 12."""

HOPPER = hopper.CAPABILITY
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

    stages: tiles of keys and of values in flight.
    multiply_registers, copy_registers: per thread of each role, multiples of 8; two multiplying
        warpgroups and one that copies share 504.
    """

    tile: int
    stages: int
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
class HopperQueryGradConfig:
    """Warp-specialised dq for compute capability 9.0: 128 queries by `tile` pooled keys.

    stages: tiles of keys and of values in flight.
    beside: add the keys of a tile while the weights of the next are made; needs two stages.
    multiply_registers, copy_registers: as in `HopperForwardConfig`.
    """

    tile: int
    stages: int
    beside: bool = False
    multiply_registers: int = 232
    copy_registers: int = 40

    def __post_init__(self) -> None:
        if self.beside and self.stages < 2:
            raise ValueError(f"stages must be at least 2 where beside is set, got {self.stages}")


@dataclass(frozen=True, kw_only=True)
class KeyGradConfig:
    """dk/dv kernel of one level below 8: `keys` pyramid rows by `rows` queries a step.

    keys: a power of two from 16 to the rows of a block.
    rows: a divisor of block_m.
    """

    keys: int
    rows: int
    warps: int
    stages: int


@dataclass(frozen=True, kw_only=True)
class HopperKeyGradConfig:
    """Warp-specialised dk/dv of one level for compute capability 9.0: 128 pyramid rows by `rows`
    queries.

    rows: 64, or 128 where `block_m` and the registers allow it.
    stages: tiles of q and of dout in flight.
    multiply_registers, copy_registers: as in `HopperForwardConfig`.
    """

    rows: int
    stages: int
    multiply_registers: int = 232
    copy_registers: int = 40


@dataclass(frozen=True, kw_only=True)
class CoarseGradConfig:
    """dk and dv of one level above 1 by query blocks: `tile` pyramid rows a step.

    rows: queries a product; block_m keeps the query block in shared memory, a divisor reads it
        again for every tile.
    workspace: bytes that the sums of one round may take (see `coarse_gradient.rounds`).
    """

    tile: int
    rows: int
    warps: int
    stages: int
    workspace: int = 2**30


ByKeyConfig = KeyGradConfig | HopperKeyGradConfig

LevelConfigs = tuple[
    ByKeyConfig, ByKeyConfig | CoarseGradConfig, ByKeyConfig | CoarseGradConfig, CoarseGradConfig
]
"""How each level's share of dk and dv is computed, finest first."""


@dataclass(frozen=True, kw_only=True)
class BackwardConfig:
    """All of the backward."""

    query: QueryGradConfig | HopperQueryGradConfig
    key: LevelConfigs


HOPPER_FORWARD = {
    64: HopperForwardConfig(tile=128, stages=4),
    128: HopperForwardConfig(tile=128, stages=2, multiply_registers=224, copy_registers=56),
}
"""By head dimension."""

HOPPER_QUERY_GRADIENT = {
    64: HopperQueryGradConfig(tile=128, stages=2),
    128: HopperQueryGradConfig(tile=64, stages=4, beside=True),
}
"""By head dimension."""

HOPPER_KEY_GRADIENT = {
    64: HopperKeyGradConfig(rows=64, stages=6),
    128: HopperKeyGradConfig(rows=64, stages=4),
}
"""By head dimension."""

HOPPER_KEY_LEVELS = {64: 1, 128: 2}
"""Levels, finest first, for which that is faster, by head dimension."""

HOPPER_KEY_ROWS = 32
"""Fewest rows of a block at a level for which it is used: 64 and 32 were measured."""


def forward_config(
    q: Tensor, v: Tensor, block_m: int, block_n: int
) -> ForwardConfig | HopperForwardConfig:
    """The forward's tile sizes for `q` `[B, H, Lq, D]` and `v` `[..., Dv]`."""
    choose = choose_plain_forward if _needs_plain(q, v) else choose_forward
    return choose(capability(q), _widest(q, v), _register_dtype(q), block_m, block_n)


def backward_config(q: Tensor, v: Tensor, block_m: int, block_n: int) -> BackwardConfig:
    """The backward's tile sizes for `q` `[B, H, Lq, D]` and `v` `[..., Dv]`."""
    choose = choose_plain_backward if _needs_plain(q, v) else choose_backward
    return choose(capability(q), _widest(q, v), _register_dtype(q), block_m, block_n)


def _needs_plain(q: Tensor, v: Tensor) -> bool:
    """Whether no warp-specialised kernel can run, whatever the GPU."""
    # On the CPU the interpreter plays an H100, but cannot run its warp-specialised kernels.
    return q.device.type == "cpu" or q.shape[-1] != v.shape[-1]


def width_of(head_dim: int) -> int:
    """Columns that a kernel multiplies for a head dimension up to 256."""
    return next(width for width in HEAD_DIMS if head_dim <= width)


def widths(head_dim: int, value_dim: int) -> dict[str, int]:
    """The constants of a kernel that name its head dimensions and its columns."""
    return {
        "D": head_dim,
        "DV": value_dim,
        "WIDTH": width_of(head_dim),
        "V_WIDTH": width_of(value_dim),
    }


def _widest(q: Tensor, v: Tensor) -> int:
    return width_of(max(q.shape[-1], v.shape[-1]))


def rows_contiguous(x: Tensor) -> Tensor:
    """`x` itself if its last dimension is dense, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _register_dtype(q: Tensor) -> torch.dtype:
    """The interpreter has no registers to save and likes few large tiles, whatever the dtype."""
    return torch.bfloat16 if q.device.type == "cpu" else q.dtype


def choose_forward(
    capability: tuple[int, int], head_dim: int, dtype: torch.dtype, block_m: int, block_n: int
) -> ForwardConfig | HopperForwardConfig:
    """Forward tile sizes; `capability` is the compute capability of the GPU.

    Those of compute capability 9.0 were measured (`docs/log/forward.md`).
    """
    if hopper.unsupported(head_dim, dtype, block_m, capability) is None:
        return HOPPER_FORWARD[head_dim]
    return choose_plain_forward(capability, head_dim, dtype, block_m, block_n)


def choose_plain_forward(
    capability: tuple[int, int], head_dim: int, dtype: torch.dtype, block_m: int, block_n: int
) -> ForwardConfig:
    """Tile sizes of the kernel that runs on every GPU, and in the interpreter."""
    if dtype == torch.float32:
        rows, tile, warps = {32: (32, 32, 8), 64: (32, 32, 8), 128: (32, 32, 16)}.get(
            head_dim, (16, 32, 16)
        )
        return ForwardConfig(rows=rows, tile=tile, tail=tile, warps=warps, stages=1)
    warps = block_m // 16
    if head_dim == 256:
        return ForwardConfig(rows=block_m, tile=64, tail=32, warps=warps, stages=2)
    if capability == HOPPER and block_m == 64:
        return ForwardConfig(rows=block_m, tile=64, tail=32, warps=4, stages=2)
    if not _has_large_shared_memory(capability):
        return ForwardConfig(rows=block_m, tile=64, tail=32, warps=warps, stages=3)
    return ForwardConfig(rows=block_m, tile=128, tail=64, warps=warps, stages=3)


def choose_backward(
    capability: tuple[int, int], head_dim: int, dtype: torch.dtype, block_m: int, block_n: int
) -> BackwardConfig:
    """Backward tile sizes; `capability` is the compute capability of the GPU.

    Those of compute capability 9.0 were measured (`docs/log/gradients.md`).
    """
    config = choose_plain_backward(capability, head_dim, dtype, block_m, block_n)
    if hopper.unsupported(head_dim, dtype, block_m, capability):
        return config
    key: Any = tuple(
        HOPPER_KEY_GRADIENT[head_dim]
        if g < HOPPER_KEY_LEVELS[head_dim] and block_n >> g >= HOPPER_KEY_ROWS
        else config.key[g]
        for g in range(4)
    )
    return BackwardConfig(query=HOPPER_QUERY_GRADIENT[head_dim], key=key)


def choose_plain_backward(
    capability: tuple[int, int], head_dim: int, dtype: torch.dtype, block_m: int, block_n: int
) -> BackwardConfig:
    """Tile sizes of the kernels that run on every GPU, and in the interpreter."""
    if dtype == torch.float32:
        most = 16 if head_dim == 256 else 32
        return BackwardConfig(
            query=QueryGradConfig(rows=16, tile=32, tail=32, warps=8, stages=1),
            key=_levels(
                block_n,
                lambda run: KeyGradConfig(keys=min(most, run), rows=16, warps=8, stages=1),
                CoarseGradConfig(tile=most, rows=16, warps=8, stages=1),
            ),
        )
    if head_dim == 256:
        return BackwardConfig(
            query=QueryGradConfig(rows=64, tile=32, tail=32, warps=4, stages=2),
            key=_levels(
                block_n,
                lambda run: KeyGradConfig(keys=min(64, run), rows=32, warps=8, stages=1),
                CoarseGradConfig(tile=64, rows=32, warps=8, stages=1),
            ),
        )
    if capability == HOPPER:
        rows = 64 if head_dim == 128 else block_m
        return BackwardConfig(
            query=QueryGradConfig(rows=rows, tile=64, tail=32, warps=4, stages=2),
            key=_levels(
                block_n,
                lambda run: _key_config(min(64, run)),
                _coarse_config(capability, head_dim, block_m),
            ),
        )
    most = 128 if _has_large_shared_memory(capability) else 64
    return BackwardConfig(
        query=QueryGradConfig(rows=block_m, tile=64, tail=32, warps=block_m // 16, stages=3),
        key=_levels(
            block_n,
            lambda run: _key_config(min(most, run)),
            _coarse_config(capability, head_dim, block_m),
        ),
    )


def _key_config(keys: int) -> KeyGradConfig:
    return KeyGradConfig(keys=keys, rows=64, warps=max(4, keys // 16), stages=2)


def _coarse_config(capability: tuple[int, int], head_dim: int, block_m: int) -> CoarseGradConfig:
    if not _has_large_shared_memory(capability):
        return CoarseGradConfig(tile=64, rows=32, warps=4, stages=2)
    # Two programs share a multiprocessor, which leaves room for one buffer or for two.
    roomy = capability == HOPPER and block_m * head_dim < 128 * 128
    return CoarseGradConfig(tile=64, rows=block_m, warps=4, stages=2 if roomy else 1)


def _levels(
    block_n: int, by_key: Callable[[int], KeyGradConfig], pooled: CoarseGradConfig
) -> LevelConfigs:
    """`by_key(run)` for runs of rows long enough to pay for reading queries, else `pooled`."""
    # Nothing is coarser than level 8, whose rows only the sums of slots can begin.
    finer, coarse = (by_key(block_n >> g) if block_n >> g >= 16 else pooled for g in (1, 2))
    return by_key(block_n), finer, coarse, pooled


def _has_large_shared_memory(capability: tuple[int, int]) -> bool:
    """Whether a block may use more than 200 KiB: H100, H200 and the B series."""
    return capability[0] in (9, 10)


def head_dims(capability: tuple[int, int]) -> tuple[int, ...]:
    """Head dimensions whose tiles fit the shared memory of the GPU."""
    large = capability == (8, 0) or _has_large_shared_memory(capability)
    return HEAD_DIMS if large else SMALL_HEAD_DIMS
