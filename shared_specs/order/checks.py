"""Checks on the arguments of a token order."""

from collections.abc import Sequence

from shared_specs.checks import check_triple
from shared_specs.config_types import CallConfig


def check_grid(grid: Sequence[int]) -> tuple[int, int, int]:
    """`grid` as three ints of at least 1; ValueError otherwise."""
    return check_triple("grid", grid, "(depth, height, width)")


def check_tile(tile: Sequence[int]) -> tuple[int, int, int]:
    """`tile` as three ints of at least 1; ValueError otherwise."""
    return check_triple("tile", tile, "(depth, height, width) of a tile")


def check_order_lengths(config: CallConfig, q_len: int, kv_len: int) -> None:
    """Refuse what a token order cannot be applied to (specification, section 8).

    Raises:
        ValueError: no grid; queries and keys of different length; a length that
            is not the grid's tokens plus the text.
    """
    method = config.rearrange_method
    if config.grid is None:
        raise ValueError(
            f"rearrange_method={method!r} needs grid=(depth, height, width), the video tokens of "
            "the sequence; got grid=None"
        )
    if q_len != kv_len:
        raise ValueError(
            f"rearrange_method={method!r} needs as many queries as keys; got q_len={q_len}, "
            f"kv_len={kv_len}"
        )
    depth, height, width = config.grid
    expected = depth * height * width + config.text_length
    if q_len != expected:
        raise ValueError(
            f"sequence length {q_len} is not grid + text: grid={config.grid} has "
            f"{depth * height * width} tokens and text_length={config.text_length}, together "
            f"{expected}"
        )
