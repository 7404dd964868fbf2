"""Attention in plain XLA: only the selected pyramid rows are gathered and multiplied.

Runs on every device. The query blocks are taken a few at a time. Their selected rows pass through
in tiles of fixed size, as many as the fullest of them needs, so that memory is bounded and the work
follows the mask although the shapes do not. On a CPU the forward pass takes all tiles at once where
they are few: there is one program for each number of them, and the fullest block chooses.
"""

from jax import Array

from psa_jax.attention.gather.backward import backward
from psa_jax.attention.gather.forward import forward
from psa_jax.attention.gather.tangent import Moved, tangent

__all__ = ["Moved", "backward", "forward", "tangent", "unsupported"]


def unsupported(q: Array, k: Array, v: Array, block_m: int, block_n: int) -> str | None:
    """The reason it cannot run on this input or device: none, it always can."""
    return None
