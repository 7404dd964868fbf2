"""Numbers of the specification as kernels take them, and some that only kernels need."""

import triton.language as tl

from shared_specs import constants

LOG2E = tl.constexpr(constants.LOG2E)
"""Logits are multiplied by it, so that exponentials are powers of 2."""

LN2 = tl.constexpr(0.6931471805599453)

LOWEST = tl.constexpr(-3.4028234663852886e38)
"""Least finite float32, the maximum of rows that saw nothing: -inf could not be subtracted."""
