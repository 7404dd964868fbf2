"""The online softmax of the warp-specialised forward, a tile of logits at a time."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def operand(p, dtype: gl.constexpr, LAYOUT: gl.constexpr):
    """p in the dtype of the values. Not where it is used, as the compiler would have it, but
    here: that frees registers and keeps the exponentials before what is waited for next."""
    if dtype == gl.bfloat16:
        p = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [p], gl.bfloat16, is_pure=False, pack=2
        )
    else:
        p = gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [p], gl.float16, is_pure=False, pack=2
        )
    return gl.convert_layout(p, LAYOUT)


@gluon.jit
def _row_max(s, LAYOUT: gl.constexpr):
    """Largest of each row. In quarters first: one long chain would wait for each comparison."""
    quarters = s.reshape([s.shape[0], 4, s.shape[1] // 4])
    return gl.convert_layout(gl.max(gl.max(quarters, 1), 1), LAYOUT)


@gluon.jit
def _row_sum(p, LAYOUT: gl.constexpr):
    """Sum of each row, in the order of `_row_max`."""
    quarters = p.reshape([p.shape[0], 4, p.shape[1] // 4])
    return gl.convert_layout(gl.sum(gl.sum(quarters, 1), 1), LAYOUT)


@gluon.jit
def whole_tile(s, top, total, scale, bias, NEGATE: gl.constexpr):
    """(weights, shrinkage of what was added before, new maximum, new sum) of a tile of one level.

    top, total: maximum so far, in powers of 2 and finite, and the sum of weights relative to it.
    """
    if NEGATE:
        s = -s
    layout: gl.constexpr = top.type.layout
    new_top = gl.maximum(top, _row_max(s, layout) * scale + bias)
    p = gl.exp2(s * scale - gl.expand_dims(new_top - bias, 1))
    shrink = gl.exp2(top - new_top)
    return p, shrink, new_top, total * shrink + _row_sum(p, layout)


@gluon.jit
def tail_tile(
    s,
    top,
    total,
    scale,
    bias,
    last,
    position,
    IS_CAUSAL: gl.constexpr,
    NEGATE: gl.constexpr,
):
    """`whole_tile` with a bias per column (-inf: not there) and the last key that it covers."""
    layout: gl.constexpr = top.type.layout
    column: gl.constexpr = gl.SliceLayout(0, s.type.layout)
    if NEGATE:
        s = -s
    s = s * scale + gl.expand_dims(gl.convert_layout(bias, column), 0)
    if IS_CAUSAL:
        last = gl.expand_dims(gl.convert_layout(last, column), 0)
        s = gl.where(last <= gl.expand_dims(position, 1), s, float("-inf"))
    new_top = gl.maximum(top, _row_max(s, layout))
    p = gl.exp2(s - gl.expand_dims(new_top, 1))
    shrink = gl.exp2(top - new_top)
    return p, shrink, new_top, total * shrink + _row_sum(p, layout)


@gluon.jit
def shrink_by(acc, shrink):
    """acc with each row times its number."""
    layout: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    return acc * gl.expand_dims(gl.convert_layout(shrink, layout), 1)
