"""Where the kernel finds things, and which tiles of columns each tile of rows visits."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
from jax import lax

from psa_jax.kernels.scores.tiles import PeakConfig

ROWS = 64
"""Rows of one wgmma, so rows of one consumer warpgroup."""


@dataclasses.dataclass(frozen=True, eq=False)
class Walk:
    """Static facts of one kernel.

    Attributes:
        config: sizes.
        heads: query heads of one launch, over all batch entries.
        group: query heads that share a key head.
        places: rows per key block.
        block_n: keys per block.
        row_tiles, column_tiles: tiles per head.
        blocks: thread blocks.
        limits: int32 `[padded rows]`, the last key position that each row sees, or None if
            every row sees every column.
        first: int `[padded key blocks, places]`, key position that each column needs.
        interpreted: whether the kernel is interpreted.
    """

    config: PeakConfig
    heads: int
    group: int
    places: int
    block_n: int
    row_tiles: int
    column_tiles: int
    blocks: int
    limits: np.ndarray | None
    first: np.ndarray
    interpreted: bool

    @property
    def row_tile(self) -> int:
        return self.config.consumers * ROWS

    @property
    def items(self) -> int:
        """Row tiles in all; each thread block takes every `blocks`-th."""
        return self.heads * self.row_tiles

    @functools.cached_property
    def spans(self) -> np.ndarray:
        """int32 `[row_tiles, 2]`: tiles of columns that all rows see whole, and that any sees.

        Positions ascend, so both are prefixes.
        """
        if self.limits is None:
            return np.full((self.row_tiles, 2), self.column_tiles, np.int32)
        limits = self.limits.reshape(self.row_tiles, 1, -1)
        tiles = self.first.reshape(1, self.column_tiles, -1)
        whole = tiles.max(-1) <= limits.min(-1)
        seen = tiles.min(-1) <= limits.max(-1)
        return np.stack([whole.sum(1), seen.sum(1)], axis=1).astype(np.int32)

    def items_of_block(self) -> jax.Array:
        return lax.div(self.items - lax.axis_index("block") + self.blocks - 1, self.blocks)

    def locate(self, n: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Head and row tile of the `n`-th item of this thread block."""
        item = lax.axis_index("block") + n * self.blocks
        tile = lax.rem(item, self.row_tiles)
        if self.limits is not None:
            tile = self.row_tiles - 1 - tile  # the longest rows first
        return lax.div(item, self.row_tiles), tile
