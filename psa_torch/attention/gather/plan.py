"""Which pyramid rows every query block visits, arranged for batched products.

The unit is a run: `block_n // 8` adjacent pyramid rows, what a level-8 block has. A block of
level `l` is `8 // l` runs, so any mix of levels is a list of equal pieces, each of one copy.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from shared_specs.constants import LEVELS
from shared_specs.geometry import Geometry
from shared_specs.pyramid import pooled_counts

RUNS_PER_BLOCK = 8
"""Runs of a block at level 1."""

SLAB_RUNS = 2**20
"""Most runs that the query blocks of one plan can visit; bounds the plan's memory."""

BATCH_LOGITS = 1280 * 1024
"""Logits computed at a time: few enough for the cache (5 MB in float32), and enough that the cores
seldom wait for each other."""


@dataclasses.dataclass(frozen=True)
class Problem(Geometry):
    """Sizes of one call, and what they alone decide.

    Attributes:
        batch, heads, kv_heads, head_dim: B, H, Hk, D.
        scale: factor on q.k.
        dtype: what the arithmetic runs in.
        device: where it runs.
    """

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, *, block_m: int, block_n: int, scale: float, is_causal: bool
    ) -> "Problem":
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        (batch, heads, q_len, head_dim), (kv_heads, kv_len) = q.shape, k.shape[1:3]
        return cls(
            q_len, kv_len, block_m, block_n, is_causal,
            batch, heads, kv_heads, head_dim, scale, dtype, q.device,
        )  # fmt: skip

    @property
    def run_rows(self) -> int:
        """Pyramid rows of a run."""
        return self.block_n // RUNS_PER_BLOCK

    @property
    def head_runs(self) -> int:
        """Runs of the pyramid of one key/value head."""
        return self.pyramid_rows // self.run_rows


class Columns(NamedTuple):
    """What every column of a product is, by run: `[runs of one head, rows of a run]`.

    Attributes:
        bias: log2 of the keys that the pyramid row covers, -inf where it covers none.
        last_key: the last of these keys.
    """

    bias: Tensor
    last_key: Tensor

    @classmethod
    def of(cls, p: Problem) -> "Columns":
        counts = torch.from_numpy(pooled_counts(p.kv_len, p.block_n))
        ends = torch.cat([torch.arange(level, p.padded_len + 1, level) for level in LEVELS])
        bias, last_key = counts.to(p.dtype).log2(), ends.clamp(max=p.kv_len) - 1
        return cls(*(x.view(-1, p.run_rows).to(p.device) for x in (bias, last_key)))


class Batch(NamedTuple):
    """`n` query blocks that visit about the same number of runs, padded in front to `r` of them.

    Attributes:
        blocks: the `n` query blocks counted over batch, head and block: int64 `[n]`, or a slice
            where they are neighbours, so that indexing with it copies nothing.
        runs: int64 `[n, r]`, runs to gather, counted over the key/value heads of all batches.
        bias: `[n, 1, r * rows of a run]`, added to the base-2 logits; -inf in padding.
        hidden: bool `[n, block_m, c]`, what the causal rule hides in the last `c` columns; None
            where it hides nothing.
    """

    blocks: Tensor | slice
    runs: Tensor
    bias: Tensor
    hidden: Tensor | None


def batches(p: Problem, levels: Tensor) -> Iterator[Batch]:
    """Every query block that visits anything, once.

    Args:
        p: the sizes.
        levels: int32 `[B, H, Nq, Nk]`.
    """
    columns = Columns.of(p)
    rows = levels.reshape(-1, levels.shape[-1])
    step = max(1, SLAB_RUNS // (rows.shape[1] * RUNS_PER_BLOCK))
    for first in range(0, rows.shape[0], step):
        yield from _slab(p, columns, rows[first : first + step], first)


def _slab(p: Problem, columns: Columns, levels: Tensor, first: int) -> Iterator[Batch]:
    blocks = torch.arange(first, first + len(levels), device=p.device)
    positions = _row_positions(p, blocks)
    per_block = torch.where(levels > 0, RUNS_PER_BLOCK // levels.clamp(min=1), 0)
    straddling = None
    if p.is_causal:
        key = torch.arange(levels.shape[1], device=p.device) * p.block_n
        first_token_end = torch.clamp(key + levels, max=p.kv_len) - 1
        per_block.masked_fill_(first_token_end > positions[:, -1:], 0)
        last_key = torch.clamp(key + p.block_n, max=p.kv_len) - 1
        # Blocks come in ascending order, so those that straddle the diagonal are a row's last.
        straddling = torch.where(last_key > positions[:, :1], per_block, 0).sum(-1)
    counts = per_block.sum(-1)
    listed = _list_runs(p, levels, per_block)
    ends = counts.cumsum(0)

    order = counts.argsort(descending=True, stable=True)
    sorted_counts, ids = counts[order].tolist(), blocks[order].tolist()
    for start, stop in _similar(sorted_counts):
        at, width = order[start:stop], sorted_counts[start]
        # Padding stands in front, and repeats the first run so that nothing else is read.
        place = ends[at, None] + torch.arange(-width, 0, device=p.device)
        begin = (ends[at] - counts[at])[:, None]
        runs = listed[torch.maximum(place, begin)]
        bias = columns.bias[runs].masked_fill_((place < begin)[..., None], -torch.inf)
        bias = bias.view(len(at), 1, -1)
        last_key = None
        if straddling is not None:
            tail = int(straddling[at].max())
            last_key = columns.last_key[runs[:, width - tail :]].view(len(at), 1, -1)
        runs = runs + _kv_head(p, blocks[at])[:, None] * p.head_runs
        n = max(1, BATCH_LOGITS // (p.block_m * width * p.run_rows))
        for i in range(0, len(at), n):
            some = slice(i, i + n)
            hidden = None
            if last_key is not None and last_key.shape[-1]:
                hidden = last_key[some] > positions[at[some], :, None]
            neighbours = _as_slice(ids[start + i : min(start + i + n, stop)])
            yield Batch(neighbours or blocks[at[some]], runs[some], bias[some], hidden)


def _row_positions(p: Problem, blocks: Tensor) -> Tensor:
    """Position of every row of the query blocks among the keys, `[len(blocks), block_m]`."""
    row = (blocks % p.q_blocks)[:, None] * p.block_m + torch.arange(p.block_m, device=p.device)
    return row.clamp(max=p.q_len - 1) + p.offset


def _kv_head(p: Problem, blocks: Tensor) -> Tensor:
    """Key/value head of every query block, counted over batches."""
    head = blocks // p.q_blocks
    return head // p.heads * p.kv_heads + head % p.heads // (p.heads // p.kv_heads)


def _list_runs(p: Problem, levels: Tensor, per_block: Tensor) -> Tensor:
    """Runs of all rows of `levels` end to end, counted within one head: int64 `[visited]`."""
    per_block = per_block.reshape(-1)
    visited = torch.repeat_interleave(per_block)
    starts = torch.zeros(max(LEVELS) + 1, dtype=torch.int64)
    for g, level in enumerate(LEVELS):
        starts[level] = p.level_start(g) // p.run_rows
    level = levels.reshape(-1)
    block = torch.arange(len(level), device=p.device) % levels.shape[1]
    first = starts.to(p.device)[level.long()] + block * per_block
    before = per_block.cumsum(0) - per_block
    return (first - before)[visited] + torch.arange(len(visited), device=p.device)


def _similar(counts: list[int]) -> Iterator[tuple[int, int]]:
    """Cut descending counts into ranges that differ by at most a tenth; zeros are left out."""
    start = 0
    while start < len(counts) and counts[start]:
        least = counts[start] - max(counts[start] // 10, 2)
        stop = start + 1
        while stop < len(counts) and counts[stop] > max(least, 0):
            stop += 1
        yield start, stop
        start = stop


def _as_slice(ids: list[int]) -> slice | None:
    """Ascending neighbours as a slice, anything else as None."""
    whole = range(ids[0], ids[0] + len(ids))
    return slice(whole.start, whole.stop) if ids == list(whole) else None
