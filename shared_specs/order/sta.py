"""The tile order of sliding tile attention (STA)."""

from functools import lru_cache

import numpy as np

from shared_specs.geometry import cdiv
from shared_specs.order.checks import check_grid, check_tile

DEFAULT_TILE = (8, 4, 4)
"""Tile used when a configuration names none: one block of 128 queries, two cubes of 64 keys."""


def sta_order(grid: tuple[int, int, int], tile: tuple[int, int, int]) -> np.ndarray:
    """Order that lists a grid tile by tile (specification, section 8).

    Tiles follow each other in raster order, and so do the tokens of a tile. A grid that the tile
    does not divide has smaller tiles at its far edges.

    Args:
        grid: `(depth, height, width)` in tokens, each at least 1.
        tile: `(depth, height, width)` of a tile in tokens, each at least 1.

    Returns:
        int32 `[depth * height * width]`, read-only: `order[i]` is the raster index
        `x + width * (y + height * z)` of the i-th token, so `rearranged = tokens[order]`.

    Raises:
        ValueError: grid or tile is not three positive integers.
    """
    return _sta_order(check_grid(grid), check_tile(tile))


@lru_cache(maxsize=64)
def _sta_order(grid: tuple[int, int, int], tile: tuple[int, int, int]) -> np.ndarray:
    tiles = [cdiv(side, length) for side, length in zip(grid, tile, strict=True)]
    place = np.indices(grid).reshape(3, -1)
    tile_of_token = np.ravel_multi_index(
        [axis // length for axis, length in zip(place, tile, strict=True)], tiles
    )
    order = np.argsort(tile_of_token, kind="stable").astype(np.int32)
    order.setflags(write=False)
    return order
