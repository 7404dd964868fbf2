"""Head dimensions between the widths that kernels have: what lies past them is masked.

A kernel of width 128 takes a head dimension of 80 as it lies in memory: columns from 80 on are
read as zeros, which change no product, and are not written. Where both are equal nothing of this
is left in the machine code.
"""

import triton
import triton.language as tl


@triton.jit
def load_columns(pointer, column, D: tl.constexpr, WIDTH: tl.constexpr):
    """Numbers at `pointer`, zeros in columns from `D` of `WIDTH` on.

    column: its column, in a shape that broadcasts to that of `pointer`.
    """
    if WIDTH == D:
        x = tl.load(pointer)
    else:
        x = tl.load(pointer, mask=column < D, other=0.0)
    return x


@triton.jit
def in_columns(mask, column, D: tl.constexpr, WIDTH: tl.constexpr):
    """`mask` where the column is one of the first `D` of `WIDTH`."""
    if WIDTH > D:
        mask = mask & (column < D)
    return mask


@triton.jit
def store_columns(pointer, x, column, D: tl.constexpr, WIDTH: tl.constexpr):
    """Stores x, but for columns from `D` of `WIDTH` on."""
    if WIDTH == D:
        tl.store(pointer, x)
    else:
        tl.store(pointer, x, mask=column < D)
