"""k-means over 16-bit tokens (specification, section 8): labels and means, nothing else in memory.

The nearest centroid of a tile of tokens is found while the centroids pass by: products of 16 bits,
added in float32, never leave the registers. Means are those of the tokens sorted by label, which
one program a centroid adds up in a fixed order.

What is multiplied. `|x - c|^2 / 2` is `|x - m|^2 / 2 - x.(c - m) + m.(c - m) + |c - m|^2 / 2` for
any `m`; here the mean of evenly spaced tokens, which one strange centroid cannot move. Tokens,
times a power of two that brings the largest element of a head below 2^14, are float16 numbers:
bfloat16 has fewer digits. `c - m`, times the same power, is *rounded* to float16, and the rounded
centroid stands in every term. So labels are those of the nearest rounded centroid, with 11 digits
of what it differs from `m` by, up to the rounding of float32 sums. Centroids themselves are
float32.

How the nearest is chosen. Minus half the square is below zero, and as an integer the less, the
nearer; its last six digits give way to the number of the centroid in its tile, so that one minimum
finds both. Distances that agree in the 17 digits that are left take the lower centroid.

At 75,600 tokens, 40 heads, 1,000 centroids, D = 128 a step multiplies 0.77 TFLOP, 1.3 ms at 600
TFLOP/s, and reads the centroids 591 times a head, 6 GB from L2; the means read the tokens once,
0.8 GB, 0.2 ms. Some six instructions an element choose the nearest, beside the
products of another program.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from psa_torch._triton.launch import launch_kernel
from psa_torch.kernels._launch import on_device_of, padded_head_dim, require_dtype
from psa_torch.kernels.label_sort import sort_by_label
from shared_specs.geometry import cdiv

DTYPES = (torch.float16, torch.bfloat16)
MAX_EXPONENT = 14
"""Elements of tokens are below two to this, those of centroids minus their mean below twice it."""

TINY = tl.constexpr(1e-30)
"""Added to every distance: none is zero, so that all have one sign."""

MEAN_ROWS = 32
"""Tokens that a mean adds up at a time."""


class NearestTile(NamedTuple):
    """Products of `rows` tokens by `columns` centroids; padding stands infinitely far away."""

    rows: int
    columns: int
    warps: int
    stages: int


# Registers for two programs of a multiprocessor: one multiplies while the other chooses.
TILE = NearestTile(rows=128, columns=64, warps=8, stages=3)


class Columns(NamedTuple):
    """Centroids as the products take them.

    Attributes:
        columns: float16 `[B, H, padded count, padded D]`.
        bias: float32 `[B, H, padded count]`, what is added to the products.
    """

    columns: Tensor
    bias: Tensor


def kmeans(tokens: Tensor, centroids: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Labels and centroids after some Lloyd steps.

    Args:
        tokens: `[B, H, N, D]`, any strides; float16 or bfloat16.
        centroids: float32 `[B, H, count, D]`, to start from.
        steps: how many.

    Returns:
        int32 labels `[B, H, N]` and float32 centroids `[B, H, count, D]`, both contiguous.

    Raises:
        TypeError: dtype other than the two.
    """
    require_dtype("tokens", tokens, DTYPES)
    scale, centre = scales(tokens), mean_token(tokens, centroids.shape[2])
    centroids, columns = move_centroids(tokens, centroids, None, scale, centre)
    for _ in range(steps):
        labels = nearest(tokens, columns, scale, centre)
        by_label = sort_by_label(labels, centroids.shape[2])
        centroids, columns = move_centroids(tokens, centroids, by_label, scale, centre)
    return nearest(tokens, columns, scale, centre), centroids


def scales(tokens: Tensor) -> Tensor:
    """float32 `[B, H]`: the powers of two that bring tokens below `2 ** MAX_EXPONENT`."""
    largest = torch.linalg.vector_norm(tokens, torch.inf, dim=(2, 3)).float()
    exponent = (MAX_EXPONENT - torch.frexp(largest).exponent).clamp(max=126)
    return torch.ldexp(torch.ones_like(largest), exponent)


def mean_token(tokens: Tensor, count: int) -> Tensor:
    """float32 `[B, H, D]`: the mean of `count` evenly spaced tokens, what centroids differ from."""
    places = torch.arange(count, device=tokens.device) * tokens.shape[2] // count
    return tokens.index_select(2, places).float().mean(2)


def nearest(tokens: Tensor, columns: Columns, scale: Tensor, centre: Tensor) -> Tensor:
    """int32 `[B, H, N]`: the nearest centroid of each token, the lower one of equally near ones."""
    batch, heads, n, head_dim = tokens.shape
    labels = torch.empty(batch, heads, n, dtype=torch.int32, device=tokens.device)
    with on_device_of(tokens):
        launch_kernel(
            _nearest_kernel,
            (cdiv(n, TILE.rows), batch * heads),
            tokens,
            *columns,
            scale,
            centre.contiguous(),
            torch.arange(TILE.columns, dtype=torch.int32, device=tokens.device),
            labels,
            *tokens.stride(),
            heads,
            n,
            columns.bias.shape[2],
            HEAD_DIM=head_dim,
            BLOCK_D=columns.columns.shape[3],
            ROWS=TILE.rows,
            COLUMNS=TILE.columns,
            num_warps=TILE.warps,
            num_stages=TILE.stages,
        )
    return labels


def move_centroids(
    tokens: Tensor, centroids: Tensor, by_label, scale: Tensor, centre: Tensor
) -> tuple[Tensor, Columns]:
    """Centroids at the mean of their tokens, and what `nearest` takes of them.

    Args:
        tokens: `[B, H, N, D]`.
        centroids: float32 `[B, H, count, D]`; one without tokens stays.
        by_label: the tokens `Sorted` by label; None: all centroids stay.
        scale: float32 `[B, H]`, a factor on all.
        centre: float32 `[B, H, D]`, what columns are measured from.
    """
    batch, heads, count, head_dim = centroids.shape
    padded, width = cdiv(count, TILE.columns) * TILE.columns, padded_head_dim(head_dim)
    centroids = centroids.contiguous()
    moved = torch.empty_like(centroids)
    columns = Columns(
        centroids.new_empty(batch, heads, padded, width, dtype=torch.float16),
        centroids.new_empty(batch, heads, padded),
    )
    bins = 0 if by_label is None else by_label.totals.shape[2]
    order, _, totals, ends = (None,) * 4 if by_label is None else by_label
    with on_device_of(tokens):
        launch_kernel(
            _mean_kernel,
            (padded, batch * heads),
            tokens,
            order,
            totals,
            ends,
            centroids,
            centre.contiguous(),
            scale,
            moved,
            *columns,
            *tokens.stride(),
            heads,
            tokens.shape[2],
            count,
            bins,
            HEAD_DIM=head_dim,
            BLOCK_D=width,
            ROWS=MEAN_ROWS,
            MOVE=by_label is not None,
            num_warps=4,
        )
    return moved, columns


@triton.jit
def _nearest_kernel(
    X,
    COLUMNS_OF,
    BIAS,
    SCALE,
    CENTRE,
    NAMES,
    LABELS,
    stride_b,
    stride_h,
    stride_l,
    stride_d,
    heads,
    n,
    padded,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid: tiles of tokens, batch * heads."""
    bh = tl.program_id(1).to(tl.int64)
    X += (bh // heads) * stride_b + (bh % heads) * stride_h
    COLUMNS_OF += bh * padded * BLOCK_D
    BIAS += bh * padded
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    real = (row < n)[:, None] & (d < HEAD_DIM)[None, :]
    at = row.to(tl.int64)[:, None] * stride_l + d[None, :] * stride_d
    x = tl.load(X + at, mask=real, other=0.0).to(tl.float32)
    scale = tl.load(SCALE + bh)
    x = (x * scale).to(tl.float16)
    centre = tl.load(CENTRE + bh * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0) * scale
    difference = x.to(tl.float32) - centre[None, :]
    # Half the square of what a token differs from the mean by, and some more against rounding.
    least = -(tl.sum(difference * difference, 1) * (0.5 + 0.5 / 64) + TINY)
    # Read, not counted: the compiler takes what it knows of a number apart, and sets it twice.
    name = tl.load(NAMES + tl.arange(0, COLUMNS))
    column = tl.arange(0, COLUMNS)
    best = tl.full([ROWS], 0x7FFFFFFF, tl.int32)
    label = tl.zeros([ROWS], tl.int32)
    for first in range(0, padded, COLUMNS):
        bias = tl.load(BIAS + first + column)
        c = tl.load(COLUMNS_OF + (first + column)[:, None] * BLOCK_D + d[None, :])
        # Minus a distance: as an integer the less, the nearer. Its last digits name the centroid.
        far = tl.dot(x, tl.trans(c), acc=least[:, None] + bias[None, :])
        named = (far.to(tl.int32, bitcast=True) & -COLUMNS) | name[None, :]
        nearest = tl.min(named, 1)
        better = (nearest & -COLUMNS) < best
        label = tl.where(better, first + (nearest & (COLUMNS - 1)), label)
        best = tl.where(better, nearest & -COLUMNS, best)
    tl.store(LABELS + bh * n + row, label, mask=row < n)


@triton.jit
def _mean_kernel(
    X,
    ORDER,
    TOTALS,
    ENDS,
    CENTROIDS,
    CENTRE,
    SCALE,
    MOVED,
    COLUMNS_OF,
    BIAS,
    stride_b,
    stride_h,
    stride_l,
    stride_d,
    heads,
    n,
    count,
    bins,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    MOVE: tl.constexpr,
):
    """Grid: centroids with their padding, batch * heads."""
    bh = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    in_head = d < HEAD_DIM
    real = in_head & (d * 0 + c < count)
    at = (bh * count + c) * HEAD_DIM + d
    mean = tl.load(CENTROIDS + at, mask=real, other=0.0)
    if MOVE:
        X += (bh // heads) * stride_b + (bh % heads) * stride_h
        counted = bh * bins + tl.minimum(c, count - 1)
        total = tl.load(TOTALS + counted)
        ORDER += bh * n + tl.load(ENDS + counted) - total
        total = tl.where(c < count, total, 0)
        sums = tl.zeros([ROWS, BLOCK_D], tl.float32)
        for first in range(0, total, ROWS):
            row = first + tl.arange(0, ROWS)
            token = tl.load(ORDER + row, mask=row < total, other=0).to(tl.int64)
            mask = (row < total)[:, None] & in_head[None, :]
            x = tl.load(X + token[:, None] * stride_l + d[None, :] * stride_d, mask=mask, other=0.0)
            sums += x.to(tl.float32)
        mean = tl.where(total > 0, tl.sum(sums, 0) / tl.maximum(total, 1), mean)
    tl.store(MOVED + at, mean, mask=real)
    scale = tl.load(SCALE + bh)
    centre = tl.load(CENTRE + bh * HEAD_DIM + d, mask=in_head, other=0.0)
    # A warm centroid may be farther away than any token of this call: far, but finite.
    column = tl.minimum(tl.maximum((mean - centre) * scale, -65504.0), 65504.0)
    column = tl.where(real, column, 0.0).to(tl.float16)
    wide = column.to(tl.float32)
    bias = -tl.sum(wide * (centre * scale), 0) - tl.sum(wide * wide, 0) * 0.5
    place = bh * tl.num_programs(0) + c
    tl.store(COLUMNS_OF + place * BLOCK_D + d, column)
    tl.store(BIAS + place, tl.where(c < count, bias, float("-inf")))
