"""Names and limits that every implementation shares (specification, sections 1 and 4)."""

import math

LEVELS = (1, 2, 4, 8)
"""Pooling factors of the pyramid, finest first. Level 0 in a mask means: the rest (`RESTS`)."""

MASK_LEVELS = (1, 2, 4, 8, 0)
"""The order in which levels are ranked, tie-broken and serialised."""

RESTS = ("skip", "mean")
"""What level 0 of a block means: not seen at all, or seen through one mean of all its keys."""

BLOCK_M = (64, 128)
"""Accepted queries per block."""

BLOCK_N = (32, 64, 128)
"""Accepted keys per block."""

MAX_HEAD_DIM = 256
"""Head dimensions are multiples of 8 up to this one; a kernel may accept fewer and says so."""

MATMUL_DTYPES = ("float16", "bfloat16", "float32", "float64")
"""Input dtypes of attention. float64 is for checking gradients; kernels take the first three."""

LOG2E = math.log2(math.e)
"""Logits are multiplied by it, so that exponentials are powers of 2."""
