"""Sizes of the scores kernel by head dimension and mask."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeakConfig:
    """How the kernel is cut up.

    Attributes:
        consumers: warpgroups that multiply, each 64 rows; they share the columns copied.
        columns: key blocks per tile, 64 or 128.
        stages: column tiles in flight.
        query_stages: row tiles in shared memory; with 2 the next one arrives while the last one
            is multiplied.
        pairs: multiply two column tiles at a time, so that one's maximum is taken while the
            other is multiplied.
        multiply_registers, copy_registers: registers per thread of the warpgroups that
            multiply and of the one that copies.
        blocks: thread blocks; None means one per multiprocessor, each taking many row tiles.
        most_bytes: block maxima held at one time, unless one head alone has more.
    """

    consumers: int = 2
    columns: int = 128
    stages: int = 4
    query_stages: int = 1
    pairs: bool = True
    multiply_registers: int = 232
    copy_registers: int = 40
    blocks: int | None = None
    most_bytes: int = 1 << 29

    def __post_init__(self) -> None:
        if self.consumers not in (1, 2, 3):
            raise ValueError(f"consumers must be 1, 2 or 3, got {self.consumers}")
        if self.columns not in (64, 128):
            raise ValueError(f"columns must be 64 or 128, got {self.columns}")
        if self.stages < 2 or self.query_stages < 1:
            raise ValueError(
                "stages must be at least 2 and query_stages at least 1, "
                f"got {self.stages} and {self.query_stages}"
            )


def default_config(head_dim: int, key_blocks: int, is_causal: bool) -> PeakConfig:
    """The sizes used unless the caller gives others."""
    # A tile of columns spans `columns` whole key blocks: narrow tiles waste less of a short
    # sequence and of the diagonal.
    columns = 64 if is_causal or key_blocks <= 64 else 128
    if head_dim == 64:
        return PeakConfig(columns=columns, stages=6, query_stages=2)
    return PeakConfig(columns=columns, stages=4 if columns == 128 else 6)
