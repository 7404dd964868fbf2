"""The sizes of one call and what follows from them (specification, sections 1 and 2).

The levels of a pyramid lie end to end along the length axis, finest first, every level padded to
whole blocks: with `n = ceil(kv_len / block_n) * block_n`, level `l` starts at row `2n - 2n // l`
and block `b` of it at a further `b * (block_n // l)`. Kernels address rows by that arithmetic.
"""

from __future__ import annotations

import dataclasses

from shared_specs.constants import LEVELS


def cdiv(x: int, y: int) -> int:
    """`x / y` rounded up."""
    return -(-x // y)


def padded_length(kv_len: int, block_n: int) -> int:
    """Keys rounded up to whole blocks."""
    return cdiv(kv_len, block_n) * block_n


def pyramid_rows(kv_len: int, block_n: int) -> int:
    """P, the rows of a pyramid over `kv_len` keys."""
    padded = padded_length(kv_len, block_n)
    return 2 * padded - padded // LEVELS[-1]


def level_start(kv_len: int, block_n: int, level: int) -> int:
    """First pyramid row of `level`."""
    padded = padded_length(kv_len, block_n)
    return 2 * padded - 2 * padded // level


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Lengths, blocks and causality of one call. Levels are named by their index in `LEVELS`.

    Attributes:
        q_len, kv_len: queries and keys, Lq and Lk.
        block_m, block_n: queries and keys per block.
        is_causal: whether row `r` sees only pooled keys that end at or before `r + offset`.
    """

    q_len: int
    kv_len: int
    block_m: int
    block_n: int
    is_causal: bool

    @property
    def q_blocks(self) -> int:
        """Nq."""
        return cdiv(self.q_len, self.block_m)

    @property
    def k_blocks(self) -> int:
        """Nk."""
        return cdiv(self.kv_len, self.block_n)

    @property
    def offset(self) -> int:
        """Position of query 0 among the keys: the last query stands at the last key."""
        return self.kv_len - self.q_len

    @property
    def padded_len(self) -> int:
        """Keys rounded up to whole blocks: the rows of level 1."""
        return padded_length(self.kv_len, self.block_n)

    @property
    def pyramid_rows(self) -> int:
        """P, the rows of all levels."""
        return pyramid_rows(self.kv_len, self.block_n)

    @property
    def pooled_rows(self) -> int:
        """Rows of the levels above the first."""
        return self.pyramid_rows - self.padded_len

    def level_start(self, g: int) -> int:
        """First pyramid row of level `LEVELS[g]`."""
        return level_start(self.kv_len, self.block_n, LEVELS[g])

    def block_rows(self, g: int) -> int:
        """Rows of a block at level `LEVELS[g]`."""
        return self.block_n // LEVELS[g]
