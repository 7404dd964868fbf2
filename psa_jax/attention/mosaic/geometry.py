"""Where the kernels find things: pyramid rows, tiles and chunks, all fixed by the shapes.

Blocks take a whole number of 8-row chunks at every level of the kernels' pyramid, because a TMA
copy into swizzled shared memory moves whole chunks. That is the pyramid of the specification,
section 2, except at level 8 of `block_n` 32: its blocks have 4 rows and are stored 8 apart, the
upper 4 rows unused. Level 1 is numbered with the others but stored apart (see `pyramid_rows`).
"""

from __future__ import annotations

import dataclasses
import functools

from shared_specs.constants import LEVELS
from shared_specs.geometry import Geometry, cdiv

CHUNK = 8
"""Rows of one swizzle atom: the smallest copy, and the unit in which masked tiles are listed."""

CONSUMERS = 2
"""Warpgroups that multiply; each holds `ROWS` query rows."""

ROWS = 64
"""Rows of one wgmma, so query rows of one consumer warpgroup."""

QUERY_TILE = CONSUMERS * ROWS
"""Query rows of one thread block."""


@dataclasses.dataclass(frozen=True)
class TiledGeometry(Geometry):
    """A geometry cut into the tiles of the kernels.

    Attributes:
        tile: pyramid rows per tile of the walk.
    """

    tile: int

    @property
    def query_tiles(self) -> int:
        return cdiv(self.q_len, QUERY_TILE)

    @property
    def padded_q_blocks(self) -> int:
        """Query blocks, rounded up to whole query tiles."""
        return self.query_tiles * (QUERY_TILE // self.block_m)

    @property
    def padded_queries(self) -> int:
        return self.query_tiles * QUERY_TILE

    @functools.cached_property
    def rows(self) -> tuple[int, ...]:
        """Pooled tokens per block, by level."""
        return tuple(self.block_rows(g) for g in range(len(LEVELS)))

    @functools.cached_property
    def pitch(self) -> tuple[int, ...]:
        """Rows that a block takes in the kernels' pyramid, by level."""
        return tuple(max(rows, CHUNK) for rows in self.rows)

    @functools.cached_property
    def start(self) -> tuple[int, ...]:
        """First pyramid row, by level."""
        return tuple(self.level_start(g) for g in range(len(LEVELS)))

    @property
    def first_pooled(self) -> int:
        """Pyramid row at which level 2 begins: the first that is stored with the pooled ones."""
        return self.start[1]

    @property
    def stored_rows(self) -> int:
        """Rows that levels 2, 4 and 8 take in the kernels' pyramid."""
        return self.start[-1] + self.k_blocks * self.pitch[-1] - self.first_pooled

    @property
    def dense_levels(self) -> tuple[int, ...]:
        """Indices of the levels whose blocks fill their pitch."""
        return tuple(g for g in range(len(LEVELS)) if self.rows[g] == self.pitch[g])

    @property
    def chunks(self) -> int:
        """Chunks per tile."""
        return self.tile // CHUNK

    @property
    def masked_blocks(self) -> int:
        """Most blocks of a row that need a mask: the ragged last one and, when causal, those that
        straddle the diagonal of the query block."""
        straddling = (self.block_m - 1) // self.block_n + 2 if self.is_causal else 0
        return min(self.k_blocks, straddling + 1)

    @property
    def masked_chunk_capacity(self) -> int:
        """Most chunks that the masked tail of a row can have, in whole tiles.

        Remainders of the levels that do not fill a tile, and the blocks that need a mask.
        """
        remainders = len(LEVELS) * (self.chunks - 1)
        chunks = remainders + self.masked_blocks * (self.block_n // CHUNK)
        return cdiv(chunks, self.chunks) * self.chunks
