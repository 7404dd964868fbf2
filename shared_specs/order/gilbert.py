"""The generalised Hilbert ("Gilbert") curve in three dimensions.

The rule of Jakub Červený's `gilbert` (https://github.com/jakubcerveny/gilbert): a cuboid is cut
into two, three or five smaller ones, each walked along its own three axes. The cuts depend only on
the signed sides, so the walk through a cuboid is built once per triple of sides and moved to its
place with array arithmetic: a grid of 80,000 video tokens needs some hundred distinct cuboids.
"""

from functools import lru_cache

import numpy as np

from shared_specs.order.checks import check_grid


def _sign(value: int) -> int:
    return (value > 0) - (value < 0)


def _first_part(side: int) -> int:
    """First part of a side cut in two: the floor of its half, made even where the side allows."""
    half = side // 2
    return half + _sign(side) if half % 2 and abs(side) > 2 else half


def _parts(sides: tuple[int, int, int]) -> list:
    """Parts of a cuboid in walking order, each `(start, ((axis, signed side), ...))`."""
    a, b, c = sides
    a1, b1, c1 = map(_first_part, sides)
    a2, b2, c2 = a - a1, b - b1, c - c1
    # The last token along each axis: a part walked backwards starts on the last token of its span.
    a_end, b_end, c_end = a - _sign(a), b1 - _sign(b), c - _sign(c)
    c1_end = c1 - _sign(c)
    width, height, depth = map(abs, sides)
    if 2 * width > 3 * height and 2 * width > 3 * depth:
        return [
            ((0, 0, 0), ((0, a1), (1, b), (2, c))),
            ((a1, 0, 0), ((0, a2), (1, b), (2, c))),
        ]
    if 3 * height > 4 * depth:
        return [
            ((0, 0, 0), ((1, b1), (2, c), (0, a1))),
            ((0, b1, 0), ((0, a), (1, b2), (2, c))),
            ((a_end, b_end, 0), ((1, -b1), (2, c), (0, -a2))),
        ]
    if 3 * depth > 4 * height:
        return [
            ((0, 0, 0), ((2, c1), (0, a1), (1, b))),
            ((0, 0, c1), ((0, a), (1, b), (2, c2))),
            ((a_end, 0, c1_end), ((2, -c1), (0, -a2), (1, b))),
        ]
    return [
        ((0, 0, 0), ((1, b1), (2, c1), (0, a1))),
        ((0, b1, 0), ((2, c), (0, a1), (1, b2))),
        ((0, b_end, c_end), ((0, a), (1, -b1), (2, -c2))),
        ((a_end, b1, c_end), ((2, -c), (0, -a2), (1, b2))),
        ((a_end, b_end, 0), ((1, -b1), (2, c1), (0, -a2))),
    ]


def _walk(sides: tuple[int, int, int], walks: dict[tuple[int, int, int], np.ndarray]) -> np.ndarray:
    """Offsets `[tokens, 3]` of the walk through a cuboid with these signed sides, from offset 0."""
    if sides in walks:
        return walks[sides]
    lengths = [abs(side) for side in sides]
    longest = int(np.argmax(lengths))
    if 0 in lengths:  # half of a side of 1
        walk = np.zeros((0, 3), np.int32)
    elif sum(lengths) == lengths[longest] + 2:  # a line: the other two sides are 1
        walk = np.zeros((lengths[longest], 3), np.int32)
        walk[:, longest] = _sign(sides[longest]) * np.arange(lengths[longest], dtype=np.int32)
    else:
        pieces = []
        for start, axes in _parts(sides):
            inner = _walk(tuple(side for _, side in axes), walks)
            piece = np.empty_like(inner)
            for column, (axis, _) in enumerate(axes):
                piece[:, axis] = inner[:, column] + start[axis]
            pieces.append(piece)
        walk = np.concatenate(pieces)
    walks[sides] = walk
    return walk


def gilbert_order(grid: tuple[int, int, int]) -> np.ndarray:
    """Order in which the Gilbert curve visits a grid (specification, section 8).

    Args:
        grid: `(depth, height, width)` in tokens, each at least 1.

    Returns:
        int32 `[depth * height * width]`, read-only: `order[i]` is the raster index
        `x + width * (y + height * z)` of the i-th token, so `rearranged = tokens[order]`.

    Raises:
        ValueError: the grid is not three positive integers.
    """
    return _gilbert_order(check_grid(grid))


@lru_cache(maxsize=64)
def _gilbert_order(grid: tuple[int, int, int]) -> np.ndarray:
    depth, height, width = grid
    # The walk starts along the longest side; of equal sides width wins over height over depth.
    sides = (width, height, depth)
    longest = int(np.argmax(sides))
    axes = [longest] + [axis for axis in range(3) if axis != longest]
    first, second, third = (sides[axis] for axis in axes)
    walk = _walk((first, second, third), {})
    x, y, z = (walk[:, axes.index(axis)] for axis in range(3))
    order = (x + width * (y + height * z)).astype(np.int32)
    order.setflags(write=False)
    return order
