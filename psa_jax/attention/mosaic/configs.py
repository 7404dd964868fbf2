"""Sizes of the kernels by head dimension and block sizes."""

from __future__ import annotations

import dataclasses

from psa_jax.attention.mosaic.geometry import ROWS


@dataclasses.dataclass(frozen=True, kw_only=True)
class WalkConfig:
    """How a kernel that walks the table (forward, dq) is cut up.

    Attributes:
        tile: pyramid rows per tile, a multiple of 64.
        stages: tiles of K and of V in flight.
        multiply_registers, copy_registers: registers per thread of the warpgroups that
            multiply and of those that copy.
        query_stages: query tiles in shared memory; with 2 the next one arrives while the last
            one is finished.
        ping_pong: let the two consumers take turns at the tensor cores, one multiplying while
            the other takes exponentials. Needs `block_m` 128, where both walk the same row.
        blocks: thread blocks; None means one per multiprocessor, each taking many query tiles.
    """

    tile: int
    stages: int
    multiply_registers: int
    copy_registers: int
    query_stages: int = 2
    ping_pong: bool = True
    blocks: int | None = None

    def __post_init__(self) -> None:
        if self.tile not in (64, 128, 192):
            raise ValueError(f"tile must be 64, 128 or 192, got {self.tile}")
        if self.stages < 2:
            raise ValueError(f"stages must be at least 2, got {self.stages}")


def forward_config(head_dim: int, block_m: int) -> WalkConfig:
    """The forward kernel's sizes."""
    if block_m == ROWS:
        return WalkConfig(
            tile=64,
            stages=2,
            multiply_registers=216,
            copy_registers=40,
            ping_pong=False,
        )
    if head_dim == 128:
        return WalkConfig(tile=128, stages=2, multiply_registers=232, copy_registers=40)
    return WalkConfig(tile=128, stages=4, multiply_registers=224, copy_registers=56)


def query_gradient_config(head_dim: int, block_m: int) -> WalkConfig:
    """The dq kernel's sizes."""
    if block_m == ROWS:
        sizes = {"tile": 64, "stages": 2, "multiply_registers": 216, "copy_registers": 40}
    elif head_dim == 128:
        sizes = {"tile": 64, "stages": 4, "multiply_registers": 232, "copy_registers": 40}
    else:
        sizes = {"tile": 128, "stages": 4, "multiply_registers": 224, "copy_registers": 56}
    return WalkConfig(**sizes, query_stages=1, ping_pong=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyConfig:
    """How the dk and dv kernel is cut up.

    Attributes:
        stages: 64-row query tiles in flight for each of the two consumers.
        multiply_registers, copy_registers, blocks: as in `WalkConfig`.
    """

    stages: int
    multiply_registers: int
    copy_registers: int
    blocks: int | None = None


def key_gradient_config(head_dim: int) -> KeyConfig:
    """The dk and dv kernel's sizes."""
    return KeyConfig(stages=2 if head_dim == 128 else 4, multiply_registers=232, copy_registers=40)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoarseConfig:
    """How the gradients of coarse levels are made in slots and summed (see `coarse_plan`).

    Attributes:
        levels: levels for which it is done; the dk and dv kernel does the others.
        tiles: 64-row tiles in shared memory, for both consumers together: an even number, at
            least 4, because a tile is given back while its consumer has the next one.
        query_stages: query blocks in shared memory; with 2 the next one arrives while the last
            one is finished.
        workspace_bytes: memory for the slots of one round.
        batch_rows: slot rows that a thread block of the sum reads at a time.
        multiply_registers, copy_registers, blocks: as in `WalkConfig`.
    """

    levels: tuple[int, ...] = (8,)
    tiles: int
    query_stages: int
    multiply_registers: int
    copy_registers: int
    workspace_bytes: int = 1 << 30
    batch_rows: int = 64
    blocks: int | None = None

    def __post_init__(self) -> None:
        if self.tiles < 4 or self.tiles % 2:
            raise ValueError(f"tiles must be even and at least 4, got {self.tiles}")
        if not set(self.levels) <= {4, 8}:
            raise ValueError(f"levels must be among 4 and 8, got {self.levels}")


def coarse_config(head_dim: int, block_m: int) -> CoarseConfig:
    """The sizes of the kernels that fill slots and sum them."""
    if head_dim == 128:
        return CoarseConfig(
            tiles=4,
            query_stages=1 if block_m == 2 * ROWS else 2,
            multiply_registers=232,
            copy_registers=40,
        )
    return CoarseConfig(tiles=8, query_stages=2, multiply_registers=232, copy_registers=40)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of the kernels."""

    forward: WalkConfig
    query_gradient: WalkConfig
    key_gradient: KeyConfig
    coarse: CoarseConfig


def default_config(head_dim: int, block_m: int) -> Config:
    """The sizes used unless the caller gives others."""
    return Config(
        forward=forward_config(head_dim, block_m),
        query_gradient=query_gradient_config(head_dim, block_m),
        key_gradient=key_gradient_config(head_dim),
        coarse=coarse_config(head_dim, block_m),
    )
