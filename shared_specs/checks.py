"""The one set of checks on what callers pass in, free of any framework.

Both frameworks describe their tensors as `Described` and call these before any work starts.
Every message names the argument, its value and what is accepted.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from shared_specs.constants import (
    BLOCK_M,
    BLOCK_N,
    LOG2E,
    MASK_LEVELS,
    MATMUL_DTYPES,
    MAX_HEAD_DIM,
    RESTS,
)
from shared_specs.geometry import cdiv

MAX_SCALE = float(np.finfo(np.float32).max) / LOG2E
"""Kernels multiply by `scale * log2(e)`, in float32."""

INTEGER_DTYPES = ("int8", "uint8", "int16", "int32", "int64")


class Described(NamedTuple):
    """What the checks need to know of a tensor.

    Attributes:
        shape: sizes; symbolic sizes are allowed.
        dtype: name without a framework prefix, for instance 'bfloat16'.
        device: name of the device, or '' where the framework places arrays itself.
    """

    shape: tuple
    dtype: str
    device: str = ""


def check_qkv(
    q: Described, k: Described, v: Described, *, dtypes: Collection[str] = MATMUL_DTYPES
) -> None:
    """Ranks, heads, lengths, head dimensions, dtypes and devices of q, k and v.

    Values may have another head dimension than queries and keys.

    Raises:
        TypeError: a dtype is not accepted, or the three differ.
        ValueError: a shape or a device does not fit.
    """
    for name, x, layout in (
        ("q", q, "[B, H, Lq, D]"),
        ("k", k, "[B, Hk, Lk, D]"),
        ("v", v, "[B, Hk, Lk, Dv]"),
    ):
        if len(x.shape) != 4:
            raise ValueError(f"{name} must be {layout}, got shape {tuple(x.shape)}")
        if x.dtype not in dtypes:
            raise TypeError(f"{name} must be {', '.join(dtypes)}, got {x.dtype}")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"q, k and v must have one dtype, got q {q.dtype}, k {k.dtype}, v {v.dtype}"
        )
    if not q.device == k.device == v.device:
        raise ValueError(
            f"q, k and v must be on one device, got q {q.device}, k {k.device}, v {v.device}"
        )
    if tuple(k.shape[:3]) != tuple(v.shape[:3]):
        raise ValueError(
            f"v must have the shape of k but for the head dimension, {tuple(k.shape[:3])} and any, "
            f"got {tuple(v.shape)}"
        )
    for axis, what in ((0, "batch"), (3, "head dimension")):
        if q.shape[axis] != k.shape[axis]:
            raise ValueError(
                f"k must have the {what} of q, {q.shape[axis]}, got {k.shape[axis]} "
                f"(q {tuple(q.shape)}, k {tuple(k.shape)})"
            )
    for name, x in (("q", q), ("k", k)):
        for axis, what in ((0, "batch"), (1, "heads"), (2, "length")):
            if x.shape[axis] < 1:
                raise ValueError(f"{name} must have {what} of at least 1, got {tuple(x.shape)}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"heads of q must be a multiple of heads of k, got {q.shape[1]} and {k.shape[1]}"
        )
    for name, x in (("", q), (" of v", v)):
        if not 1 <= x.shape[3] <= MAX_HEAD_DIM or x.shape[3] % 8:
            raise ValueError(
                f"head dimension{name} must be a multiple of 8 in 8..{MAX_HEAD_DIM}, "
                f"got {x.shape[3]}"
            )


def is_array(value: Any) -> bool:
    """Whether `value` is an array or tensor where a number is meant.

    One compares and converts as its number does, but loses its gradient on the way, and a traced
    one fails later and without a name. NumPy's scalars are numbers.
    """
    # Numbers first: of one that is a symbol PyTorch's compiler cannot tell what it has.
    return not isinstance(value, (int, float, np.generic)) and hasattr(value, "shape")


def check_blocks(block_m: Any, block_n: Any) -> None:
    """Block sizes given outside a configuration."""
    for name, value, accepted in (("block_m", block_m, BLOCK_M), ("block_n", block_n, BLOCK_N)):
        if isinstance(value, bool) or is_array(value) or value not in accepted:
            raise ValueError(f"{name} must be one of {accepted}, got {value!r}")


def check_scale(scale: Any) -> None:
    """`scale` is None or a number, Python's or NumPy's, that is finite in float32, also when it is
    multiplied by log2(e)."""
    if scale is None:
        return
    numbers = (int, float, np.integer, np.floating)
    if isinstance(scale, bool) or not isinstance(scale, numbers):
        raise TypeError(f"scale must be None or a Python number, got {scale!r}")
    if not math.isfinite(scale) or abs(float(scale)) > MAX_SCALE:
        raise ValueError(
            f"scale must be finite in float32, at most {MAX_SCALE:.3g} in size, got {scale}"
        )


def check_flag(name: str, value: Any) -> None:
    """A switch is True or False, nothing that merely looks like it."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_integer(name: str, value: Any, least: int = 0) -> int:
    """A count, as a Python integer; True is none, and an array would lose what it is part of.

    Raises:
        TypeError: it is not an integer of Python or NumPy.
        ValueError: it is below `least`.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        kind = "an integer, not an array," if is_array(value) else "an integer,"
        raise TypeError(f"{name} must be {kind} got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def check_number(name: str, value: Any) -> float:
    """A finite number, as a Python float.

    Raises:
        TypeError: it is none, or an array.
        ValueError: it is not finite.
    """
    text = isinstance(value, (bool, str, bytes))
    if text or is_array(value) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, not an array, got {value!r}")
    try:
        value = float(value)
    except OverflowError as error:
        raise ValueError(f"{name} must be finite, got {value!r}") from error
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return value


def check_triple(name: str, value: Sequence[int], meaning: str) -> tuple[int, int, int]:
    """`value` as three ints of at least 1; ValueError naming the argument otherwise."""
    accepted = f"{name} must be {meaning}, three integers of at least 1; got {value!r}"
    if isinstance(value, (str, bytes)) or not hasattr(value, "__len__") or len(value) != 3:
        raise ValueError(accepted)
    try:
        first, second, third = (check_integer(name, side, 1) for side in value)
    except (TypeError, ValueError) as error:
        raise ValueError(accepted) from error
    return first, second, third


def check_rest(rest: Any) -> None:
    """`rest` is 'skip' or 'mean'."""
    if not isinstance(rest, str) or rest not in RESTS:
        raise ValueError(f"rest must be one of {', '.join(map(repr, RESTS))}, got {rest!r}")


def check_lens(name: str, lens: Described, batch: int, device: str) -> None:
    """Lengths of the sequences of a batch: integers `[B]` on the device of q.

    Raises:
        TypeError: other numbers.
        ValueError: another shape or device.
    """
    if lens.dtype not in INTEGER_DTYPES:
        raise TypeError(f"{name} must hold integers, got {lens.dtype}")
    if tuple(lens.shape) != (batch,):
        raise ValueError(f"{name} must be [B] = ({batch},), got shape {tuple(lens.shape)}")
    if lens.device != device:
        raise ValueError(f"{name} must be on the device of q, {device}, got {lens.device}")


def check_levels_shape(
    levels: Described, q: Described, k: Described, *, block_m: int, block_n: int
) -> str:
    """Which serial form `levels` has, from its shape.

    Returns:
        'dense' for `[B, H, Nq, Nk]`, 'segments' for `[B, H, Nq, Nk + 5]`.
    """
    if levels.dtype not in INTEGER_DTYPES:
        raise TypeError(f"levels must be an integer tensor, got {levels.dtype}")
    if levels.device != q.device:
        raise ValueError(f"levels must be on the device of q, {q.device}, got {levels.device}")
    n_q, n_k = cdiv(q.shape[2], block_m), cdiv(k.shape[2], block_n)
    dense = (q.shape[0], q.shape[1], n_q, n_k)
    segments = (*dense[:3], n_k + len(MASK_LEVELS))
    if tuple(levels.shape) == dense:
        return "dense"
    if tuple(levels.shape) == segments:
        return "segments"
    raise ValueError(
        f"levels must be {dense} (old_mask_type) or {segments} (new_mask_type) for q "
        f"{tuple(q.shape)}, k {tuple(k.shape)}, block_m={block_m}, block_n={block_n}, "
        f"got {tuple(levels.shape)}"
    )


def check_implementation(name: Any, known: Collection[str]) -> None:
    """`implementation` is None or a known name."""
    if name is not None and name not in known:
        raise ValueError(
            f"implementation must be None or one of {', '.join(map(repr, known))}, got {name!r}"
        )
