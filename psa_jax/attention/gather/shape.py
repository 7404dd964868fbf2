"""The sizes of one call: what is taken at a time, and how arrays are cut for it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from shared_specs.constants import LEVELS
from shared_specs.geometry import Geometry, cdiv

TILE_ROWS = 256
"""Pyramid rows of one tile: little waste on a part-full last tile, enough for fast products."""

CPU_BLOCKS, OTHER_BLOCKS = 8, 128
"""Query blocks (over batch and heads) taken at a time: a cache full, or enough for many cores."""

ONE_PASS_BLOCKS = 4
"""The same for a forward pass in one pass (see below), which holds more of each block at a time."""

ONE_PASS_ROWS, ONE_PASS_STEP = 2048, 64
"""On a CPU the forward pass takes up to so many rows at once, in a program for each multiple of the
step: fine enough that few rows are multiplied for nothing, and still few programs to compile."""

LOOP_TILES = 4
"""Tiles it takes together where the rows are more. Products of a few hundred rows leave its cores
waiting for each other."""


@dataclasses.dataclass(frozen=True)
class Shape(Geometry):
    """The static side of one call, for grouped queries `[B, Hk, G, Lq, D]`."""

    batch: int
    kv_heads: int
    group: int
    head_dim: int
    scale: float
    cpu_blocks: int = CPU_BLOCKS

    @classmethod
    def of(cls, q, k, *, block_m: int, block_n: int, scale: float, is_causal: bool) -> "Shape":
        """From q `[B, H, Lq, D]` and k `[B, Hk, Lk, D]`."""
        (b, h, q_len, d), (_, h_kv, kv_len, _) = q.shape, k.shape
        return cls(q_len, kv_len, block_m, block_n, is_causal, b, h_kv, h // h_kv, d, scale)

    def one_head(self) -> "Shape":
        """The same call for one batch entry and key head."""
        return dataclasses.replace(self, batch=1, kv_heads=1)

    @property
    def run(self) -> int:
        """Rows of a run."""
        return self.block_n // LEVELS[-1]

    @property
    def runs(self) -> int:
        """Runs of the pyramid."""
        return self.pyramid_rows // self.run

    @property
    def most_rows(self) -> int:
        """Most pyramid rows that a query block can have: all its key blocks at level 1."""
        return self.padded_len

    @property
    def tile_rows(self) -> int:
        return min(TILE_ROWS, self.most_rows)

    @property
    def one_pass_rows(self) -> tuple[int, ...]:
        """Rows, ascending, that the forward pass has a program for which takes them all at once.

        None where several key heads are taken together: those go tile by tile, in bounded memory.
        """
        if jax.default_backend() != "cpu" or self.batch * self.kv_heads > 1:
            return ()
        most = min(ONE_PASS_ROWS, self.most_rows)
        return (*range(ONE_PASS_STEP, most, ONE_PASS_STEP), most)

    @property
    def loop_rows(self) -> int:
        """Rows of a tile where the forward pass goes tile by tile."""
        return self.tile_rows * (LOOP_TILES if self.one_pass_rows else 1)

    @property
    def chunk(self) -> int:
        """Query blocks of each head that are taken at a time."""
        wanted = self.cpu_blocks if jax.default_backend() == "cpu" else OTHER_BLOCKS
        return min(self.q_blocks, max(1, wanted // (self.batch * self.kv_heads * self.group)))

    @property
    def chunks(self) -> int:
        return cdiv(self.q_blocks, self.chunk)

    def group_heads(self, x: Array) -> Array:
        """`[B, H, ...]` to `[B, Hk, G, ...]`."""
        return x.reshape(self.batch, self.kv_heads, self.group, *x.shape[2:])

    def split_rows(self, x: Array) -> Array:
        """`[B, Hk, G, Lq, ...]` to `[chunks, B, Hk, G, chunk, block_m, ...]`, zeros at the end."""
        rows = self.chunks * self.chunk * self.block_m
        x = _pad(x, 3, rows)
        x = x.reshape(*x.shape[:3], self.chunks, self.chunk, self.block_m, *x.shape[4:])
        return jnp.moveaxis(x, 3, 0)

    def join_rows(self, x: Array) -> Array:
        """The inverse of `split_rows`."""
        x = jnp.moveaxis(x, 0, 3)
        return x.reshape(*x.shape[:3], -1, *x.shape[6:])[:, :, :, : self.q_len]

    def split_blocks(self, x: Array) -> Array:
        """`[B, Hk, G, Nq, ...]` to `[chunks, B, Hk, G, chunk, ...]`, zeros past the end."""
        x = _pad(x, 3, self.chunks * self.chunk)
        x = x.reshape(*x.shape[:3], self.chunks, self.chunk, *x.shape[4:])
        return jnp.moveaxis(x, 3, 0)

    def positions(self) -> Array:
        """Key position of every query, int32 `[chunks, chunk, block_m]`, for a causal mask."""
        rows = np.arange(self.chunks * self.chunk * self.block_m, dtype=np.int32)
        rows = rows.reshape(self.chunks, self.chunk, self.block_m)
        return jnp.asarray(rows + np.int32(self.offset))


def _pad(x: Array, axis: int, size: int) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)
