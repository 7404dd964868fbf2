"""Numbers that kernels use, and those who launch them by their `.value`."""

import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
"""Logits are multiplied by it, so that exponentials are powers of 2."""

LN2 = tl.constexpr(0.6931471805599453)

LOWEST = tl.constexpr(-3.4028234663852886e38)
"""Least finite float32, the maximum of rows that saw nothing: -inf could not be subtracted."""
