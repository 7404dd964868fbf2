"""Defect scores in two passes (specification, section 5, `defect`).

The first multiplies sampled queries by all keys and keeps, of every block, what each pooled level
loses of its mass, relative to the largest logit of the row in that block: the row's normaliser is
known only at its end. The second divides by it, squares and takes means over a query block.

Counts at 24 heads, 32,768 tokens, 8 of 128 queries, D = 128: 0.41 TFLOP; 1.9 exponentials a
product, 3.1e9, 0.85 ms of the special function units of 132 processors; 0.5 GB between the passes,
written and read once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from psa_torch._triton.constants import LOG2E
from psa_torch._triton.launch import launch_kernel
from psa_torch.kernels._launch import (
    next_power_of_2,
    on_device_of,
    padded_head_dim,
    require_dtype,
    resident_programs,
)
from shared_specs.defect import defect_offsets
from shared_specs.geometry import cdiv

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def defect_scores(
    q: Tensor,
    k: Tensor,
    *,
    block_m: int,
    block_n: int,
    sample_m: int,
    scale: float,
    causal: bool,
    rest_mean: bool,
) -> Tensor:
    """As `psa_torch.defect.defect_scores`, for float16, bfloat16 and float32."""
    require_dtype("q", q, DTYPES)
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    batch, heads, q_len, head_dim = q.shape
    kv_len = k.shape[2]
    n_q, n_k = cdiv(q_len, block_m), cdiv(kv_len, block_n)
    samples, tile = n_q * sample_m, 128 if head_dim <= 128 and q.dtype != torch.float32 else 64
    tiles = cdiv(samples, tile) * batch * heads
    strips = max(1, min(cdiv(resident_programs(q, 4), tiles), cdiv(n_k, 8)))
    lost = q.new_empty(batch * heads, n_k, 5, samples, dtype=torch.float32)
    parts = q.new_empty(batch * heads, strips, 2, samples, dtype=torch.float32)
    scores = q.new_empty(batch, heads, n_q, n_k, 4, dtype=torch.float32)
    places = (block_m // sample_m, int(defect_offsets(block_m, sample_m)[0]))
    with on_device_of(q):
        launch_kernel(
            lost_masses,
            (tiles, strips),
            q,
            k,
            lost,
            parts,
            *q.stride()[:3],
            *k.stride()[:3],
            scale * LOG2E.value,
            heads,
            heads // k.shape[1],
            q_len,
            kv_len,
            samples,
            n_k,
            cdiv(n_k, strips),
            *places,
            D=head_dim,
            WIDTH=padded_head_dim(head_dim),
            BLOCK_N=block_n,
            ROWS=tile,
            IS_CAUSAL=causal,
            REST_MEAN=rest_mean,
            num_warps=8 if tile == 128 else 4,
            num_stages=3 if q.dtype != torch.float32 else 1,
        )
        rows = max(64, sample_m)
        launch_kernel(
            mean_squares,
            (cdiv(samples, rows) * cdiv(n_k, 32), batch * heads),
            lost,
            parts,
            scores,
            q_len,
            kv_len,
            n_q,
            n_k,
            strips,
            *places,
            BLOCK_N=block_n,
            SAMPLES=sample_m,
            QUERIES=rows // sample_m,
            KEYS=32,
            STRIPS=next_power_of_2(strips),
            IS_CAUSAL=causal,
            num_warps=4,
        )
    return scores


@triton.jit
def _key_of_column(BLOCK_N: tl.constexpr):
    """Which key of its block each column of a product holds.

    A thread has pairs of columns eight apart. In this order they are neighbours, so that all keys
    of a pooled token are in one thread: pooling moves nothing.
    """
    n = tl.arange(0, BLOCK_N)
    return n % 8 // 2 * (BLOCK_N // 4) + n // 8 * 2 + n % 2


@triton.jit
def _first_pairs(x, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Keys 2t and 2t + 1 apart, `[ROWS, BLOCK_N // 8, 4]` each."""
    return tl.split(tl.reshape(x, (ROWS, BLOCK_N // 8, 4, 2)))


@triton.jit
def _pairs(x, ROWS: tl.constexpr, COUNT: tl.constexpr):
    """Tokens 2t and 2t + 1 of `[ROWS, 2 * COUNT, 4]` apart, `[ROWS, COUNT, 4]` each."""
    return tl.split(tl.permute(tl.reshape(x, (ROWS, COUNT, 2, 4)), (0, 1, 3, 2)))


@triton.jit
def _sum(x):
    # What a thread holds first, then what its neighbours do.
    return tl.sum(tl.sum(x, 1), 1)


@triton.jit
def _lost(mass, sums, count, hidden, top, SIZE: tl.constexpr):
    """Mass that tokens of `SIZE` keys lose where some are past the end or not seen.

    Args:
        sums, count, hidden: `[ROWS, n, 4]`: sums of the logits of real keys, how many there are,
            and how many of them are not seen.
    """
    whole = (hidden == 0) & (count > 0)
    mean = sums / tl.maximum(count, 1.0) - top[:, None, None]
    return mass - _sum(tl.where(whole, count * tl.math.exp2(tl.where(whole, mean, 0.0)), 0.0))


@triton.jit
def lost_masses(
    q_pointer,
    k_pointer,
    lost_pointer,
    parts_pointer,
    q_stride_b,
    q_stride_h,
    q_stride_m,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    scale,
    heads,
    group,
    q_len,
    kv_len,
    samples,
    blocks,
    strip_blocks,
    step,
    offset,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    REST_MEAN: tl.constexpr,
):
    """`ROWS` sampled queries of one head over a strip of key blocks.

    lost `[B * H, Nk, 5, samples]`: what levels 2, 4, 8 and the rest lose, over exp2 of the fifth,
    the largest logit; parts `[B * H, strips, 2, samples]`: largest logit and sum of the strip.
    `scale` is times log2(e).
    """
    row_tiles = (samples + ROWS - 1) // ROWS
    batch_head = (tl.program_id(0) // row_tiles).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    r = (tl.program_id(0) % row_tiles) * ROWS + tl.arange(0, ROWS)
    real_row = r < samples
    row = tl.minimum(r * step + offset, q_len - 1)
    last = row + (kv_len - q_len)
    d = tl.arange(0, WIDTH)
    n = _key_of_column(BLOCK_N)
    q_pointer += batch * q_stride_b + head * q_stride_h
    k_pointer += batch * k_stride_b + (head // group).to(tl.int64) * k_stride_h
    lost_pointer += batch_head * blocks * 5 * samples
    q = tl.load(
        q_pointer + row.to(tl.int64)[:, None] * q_stride_m + d[None, :],
        mask=real_row[:, None] & (d < D)[None, :],
        other=0.0,
    )
    begin = tl.program_id(1) * strip_blocks
    end = tl.minimum(begin + strip_blocks, blocks)
    whole_end = kv_len // BLOCK_N
    if IS_CAUSAL:
        end = tl.minimum(end, tl.maximum(tl.max(last, 0) + BLOCK_N, 0) // BLOCK_N)
        whole_end = tl.minimum(whole_end, tl.maximum(tl.min(last, 0) + 1, 0) // BLOCK_N)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for j in tl.range(begin, end):
        column = j * BLOCK_N + n
        k = tl.load(
            k_pointer + column.to(tl.int64)[:, None] * k_stride_n + d[None, :],
            mask=(column < kv_len)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if j < whole_end:
            peak = tl.max(s, 1)
            one = tl.math.exp2(s - peak[:, None])
            mass = tl.sum(one, 1)
            # The exponential of a mean is the geometric mean of exponentials. Where one of them
            # underflows beside the row's largest, the mean is below 2^-63 of that.
            first, second = _first_pairs(one, ROWS, BLOCK_N)
            twos = tl.sqrt(first * second)
            first, second = _pairs(twos, ROWS, BLOCK_N // 16)
            fours = tl.sqrt(first * second)
            first, second = _pairs(fours, ROWS, BLOCK_N // 32)
            eights = tl.sqrt(first * second)
            lost2 = mass - 2 * _sum(twos)
            lost4 = mass - 4 * _sum(fours)
            lost8 = mass - 8 * _sum(eights)
            rest = mass
            if REST_MEAN:
                mean = tl.sum(s, 1) * (1.0 / BLOCK_N)
                rest = mass - BLOCK_N * tl.math.exp2(mean - peak)
        else:
            real = (column < kv_len)[None, :] & real_row[:, None]
            seen = real
            if IS_CAUSAL:
                seen = real & (column[None, :] <= last[:, None])
            peak = tl.max(tl.where(seen, s, float("-inf")), 1)
            peak = tl.where(peak == float("-inf"), 0.0, peak)
            weights = tl.math.exp2(tl.where(seen, s - peak[:, None], 0.0))
            mass = tl.sum(tl.where(seen, weights, 0.0), 1)
            some = tl.where(real, s, 0.0)
            count = tl.where(real, 1.0, 0.0)
            hidden = tl.where(real & (seen == 0), 1.0, 0.0)
            rest = mass
            if REST_MEAN:
                keys = tl.sum(count, 1)
                whole = (tl.sum(hidden, 1) == 0) & (keys > 0)
                mean = tl.where(whole, tl.sum(some, 1) / tl.maximum(keys, 1.0) - peak, 0.0)
                rest = mass - tl.where(whole, keys * tl.math.exp2(mean), 0.0)
            some_first, some_second = _first_pairs(some, ROWS, BLOCK_N)
            count_first, count_second = _first_pairs(count, ROWS, BLOCK_N)
            hidden_first, hidden_second = _first_pairs(hidden, ROWS, BLOCK_N)
            sums, counts = some_first + some_second, count_first + count_second
            hiddens = hidden_first + hidden_second
            lost2 = _lost(mass, sums, counts, hiddens, peak, 2)
            some_first, some_second = _pairs(sums, ROWS, BLOCK_N // 16)
            count_first, count_second = _pairs(counts, ROWS, BLOCK_N // 16)
            hidden_first, hidden_second = _pairs(hiddens, ROWS, BLOCK_N // 16)
            sums4, counts4 = some_first + some_second, count_first + count_second
            hiddens4 = hidden_first + hidden_second
            lost4 = _lost(mass, sums4, counts4, hiddens4, peak, 4)
            some_first, some_second = _pairs(sums4, ROWS, BLOCK_N // 32)
            count_first, count_second = _pairs(counts4, ROWS, BLOCK_N // 32)
            hidden_first, hidden_second = _pairs(hiddens4, ROWS, BLOCK_N // 32)
            sums8, counts8 = some_first + some_second, count_first + count_second
            lost8 = _lost(mass, sums8, counts8, hidden_first + hidden_second, peak, 8)
        at = lost_pointer + tl.cast(j, tl.int64) * 5 * samples + r
        tl.store(at, lost2, mask=real_row)
        tl.store(at + samples, lost4, mask=real_row)
        tl.store(at + 2 * samples, lost8, mask=real_row)
        tl.store(at + 3 * samples, rest, mask=real_row)
        tl.store(at + 4 * samples, peak, mask=real_row)
        # A block that is not seen has no mass: its peak, which says nothing, must not count.
        new_top = tl.where(mass > 0, tl.maximum(top, peak), top)
        origin = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = tl.where(mass > 0, tl.math.exp2(tl.minimum(peak - origin, 0.0)), 0.0)
        total = total * tl.math.exp2(top - origin) + mass * shrink
        top = new_top
    at = parts_pointer + ((batch_head * tl.num_programs(1) + tl.program_id(1)) * 2) * samples + r
    tl.store(at, top, mask=real_row)
    tl.store(at + samples, total, mask=real_row)


@triton.jit
def mean_squares(
    lost_pointer,
    parts_pointer,
    scores_pointer,
    q_len,
    kv_len,
    q_blocks,
    blocks,
    strips,
    step,
    offset,
    BLOCK_N: tl.constexpr,
    SAMPLES: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    STRIPS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
):
    """Scores `[B * H, Nq, Nk, 4]` of `QUERIES` query blocks and `KEYS` key blocks of one head."""
    samples = q_blocks * SAMPLES
    key_tiles = (blocks + KEYS - 1) // KEYS
    i0 = (tl.program_id(0) // key_tiles) * QUERIES
    j = (tl.program_id(0) % key_tiles) * KEYS + tl.arange(0, KEYS)
    r = i0 * SAMPLES + tl.arange(0, QUERIES * SAMPLES)
    batch_head = tl.program_id(1).to(tl.int64)

    strip = tl.arange(0, STRIPS)
    at = ((batch_head * strips + strip)[:, None] * 2) * samples + r[None, :]
    inside = (strip < strips)[:, None] & (r < samples)[None, :]
    tops = tl.load(parts_pointer + at, mask=inside, other=float("-inf"))
    sums = tl.load(parts_pointer + at + samples, mask=inside, other=0.0)
    top = tl.max(tops, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(sums * tl.math.exp2(tops - top[None, :]), 0)
    total = tl.where(total > 0, total, 1.0)

    seen = (j < blocks)[:, None] & (r < samples)[None, :]
    if IS_CAUSAL:
        last = tl.minimum(r * step + offset, q_len - 1) + (kv_len - q_len)
        seen = seen & ((j * BLOCK_N)[:, None] <= last[None, :])
    at = lost_pointer + (batch_head * blocks + j)[:, None] * 5 * samples + r[None, :]
    peak = tl.load(at + 4 * samples, mask=seen, other=0.0)
    # Where a block is seen its peak is at most the row's.
    factor = tl.math.exp2(tl.minimum(peak - top[None, :], 0.0)) / total[None, :]
    i = i0 + tl.arange(0, QUERIES)
    place = ((batch_head * q_blocks + i)[None, :] * blocks + j[:, None]) * 4
    real = (j < blocks)[:, None] & (i < q_blocks)[None, :]
    for level in tl.static_range(4):
        lost = tl.load(at + level * samples, mask=seen, other=0.0) * factor
        squares = tl.sum(tl.reshape(lost * lost, (KEYS, QUERIES, SAMPLES)), 2) * (1.0 / SAMPLES)
        tl.store(scores_pointer + place + level, squares, mask=real)
