"""A stable sort of tokens by their label: a counting sort, whose sums are integers.

Three launches. Labels are counted in chunks of tokens; the counts of a label are summed over the
chunks before; and each token goes to: tokens of lower labels, plus tokens of its label in chunks
before, plus those before it in its own chunk. There are no atomic additions whose order could show.
At 75,600 tokens, 40 heads, 1,024 labels: labels read four times, 48 MB of counts written and read
three times, an order and its inverse written, 0.2 GB in all: 0.05 ms at 4.8 TB/s. Counting inside a
chunk is 256 comparisons a token, 0.1 ms.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from psa_torch._triton.launch import launch_kernel
from psa_torch.kernels._launch import next_power_of_2, on_device_of
from shared_specs.geometry import cdiv

CHUNK = 256
LANES = 32
SCAN_ROWS = 128


class Sorted(NamedTuple):
    """Tokens by label.

    Attributes:
        order: int32 `[B, H, length]`, the token at each place.
        inverse: int32 `[B, H, length]`, the place of each token.
        totals: int32 `[B, H, bins]`, tokens of each label.
        ends: int32 `[B, H, bins]`, those of this label and of lower ones. What stands past the
            labels in both is of no meaning.
    """

    order: Tensor
    inverse: Tensor
    totals: Tensor
    ends: Tensor


def sort_by_label(
    labels: Tensor, count: int, curve: Tensor | None = None, *, start: int = 0, length: int = 0
) -> Sorted:
    """Sort tokens by label, equal labels along the curve.

    Args:
        labels: int32 `[B, H, N]`, contiguous, in `0 … count - 1`.
        count: number of labels.
        curve: int32 `[N]`, a permutation; None: equal labels stay in the order of the tokens.
        start, length: the tokens are `start … start + N - 1` of a sequence of this many (0: of N),
            the others of which stay in place.
    """
    batch, heads, n = labels.shape
    length = length or n
    bins = max(128, next_power_of_2(count))
    chunks = cdiv(n, CHUNK)
    order = labels.new_empty(batch, heads, length)
    inverse = torch.empty_like(order)
    for x in (order, inverse):
        for rest in (slice(0, start), slice(start + n, length)):
            if rest.stop > rest.start:
                x[..., rest] = torch.arange(
                    rest.start, rest.stop, dtype=torch.int32, device=x.device
                )
    counts = labels.new_empty(batch, heads, chunks, bins)
    totals = labels.new_empty(batch, heads, bins)
    with on_device_of(labels):
        grid, sizes = (chunks, batch * heads), {"BINS": bins, "HAS_CURVE": curve is not None}
        launch_kernel(
            _count_kernel, grid, labels, curve, counts, n, chunks, CHUNK=CHUNK, **sizes, num_warps=4
        )
        launch_kernel(
            _scan_kernel,
            (bins // LANES, batch * heads),
            counts,
            totals,
            chunks,
            BINS=bins,
            LANES=LANES,
            ROWS=SCAN_ROWS,
            num_warps=4,
        )
        ends = totals.cumsum(-1, dtype=torch.int32)
        launch_kernel(
            _place_kernel,
            grid,
            labels,
            curve,
            counts,
            totals,
            ends,
            order,
            inverse,
            n,
            chunks,
            start,
            length,
            CHUNK=CHUNK,
            LANES=LANES,
            **sizes,
            num_warps=4,
        )
    return Sorted(order, inverse, totals, ends)


@triton.jit
def _tokens_and_labels(LABELS, CURVE, place, n, BINS: tl.constexpr, HAS_CURVE: tl.constexpr):
    """The tokens at some places and their labels; the last bin past the end."""
    real = place < n
    token = place
    if HAS_CURVE:
        token = tl.load(CURVE + place, mask=real, other=0)
    label = tl.load(LABELS + token, mask=real, other=BINS - 1)
    return token, label


@triton.jit
def _count_kernel(
    LABELS,
    CURVE,
    COUNTS,
    n,
    chunks,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,
    HAS_CURVE: tl.constexpr,
):
    """Grid: chunks, batch * heads."""
    bh = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    _, label = _tokens_and_labels(LABELS + bh * n, CURVE, place, n, BINS, HAS_CURVE)
    row = COUNTS + (bh * chunks + tl.program_id(0)) * BINS
    bin = tl.arange(0, BINS)
    past = tl.maximum(tl.program_id(0) * CHUNK + CHUNK - n, 0)  # counted in the last bin
    tl.store(row + bin, tl.histogram(label, BINS) - tl.where(bin == BINS - 1, past, 0))


@triton.jit
def _scan_kernel(
    COUNTS, TOTALS, chunks, BINS: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr
):
    """Counts become those of all chunks before. Grid: groups of bins, batch * heads."""
    bh = tl.program_id(1).to(tl.int64)
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    COUNTS += bh * chunks * BINS
    before = tl.zeros([LANES], tl.int32)
    for first in range(0, chunks, ROWS):
        row = first + tl.arange(0, ROWS)
        at = COUNTS + row[:, None] * BINS + lane[None, :]
        real = (row < chunks)[:, None]
        count = tl.load(at, mask=real, other=0)
        tl.store(at, tl.cumsum(count, 0) - count + before[None, :], mask=real)
        before += tl.sum(count, 0)
    tl.store(TOTALS + bh * BINS + lane, before)


@triton.jit
def _place_kernel(
    LABELS,
    CURVE,
    COUNTS,
    TOTALS,
    ENDS,
    ORDER,
    INVERSE,
    n,
    chunks,
    start,
    length,
    CHUNK: tl.constexpr,
    LANES: tl.constexpr,
    BINS: tl.constexpr,
    HAS_CURVE: tl.constexpr,
):
    """Grid: chunks, batch * heads."""
    bh = tl.program_id(1).to(tl.int64)
    LABELS += bh * n
    first = tl.program_id(0) * CHUNK
    place = first + tl.arange(0, CHUNK)
    token, label = _tokens_and_labels(LABELS, CURVE, place, n, BINS, HAS_CURVE)
    rank = tl.zeros([CHUNK], tl.int32)
    before = tl.arange(0, CHUNK).to(tl.uint32)
    for part in range(0, CHUNK, LANES):
        other = part + tl.arange(0, LANES)
        _, label_there = _tokens_and_labels(LABELS, CURVE, first + other, n, BINS, HAS_CURVE)
        # Same label and before: one comparison without a sign. The sum is over a thread's own axis.
        ahead = (label_there * CHUNK + other)[:, None] - (label * CHUNK)[None, :]
        rank += tl.sum((ahead.to(tl.uint32, bitcast=True) < before[None, :]).to(tl.int32), 0)
    rank += tl.load(COUNTS + (bh * chunks + tl.program_id(0)) * BINS + label)
    rank += tl.load(ENDS + bh * BINS + label) - tl.load(TOTALS + bh * BINS + label)
    real = place < n
    ORDER += bh * length + start
    INVERSE += bh * length + start
    tl.store(ORDER + rank, token + start, mask=real)
    tl.store(INVERSE + token, rank + start, mask=real)
