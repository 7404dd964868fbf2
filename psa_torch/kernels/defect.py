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

from psa_torch.kernels._launch import (
    cdiv,
    next_power_of_2,
    on_device_of,
    padded_head_dim,
    require_dtype,
    resident_programs,
)
from shared_specs.defect import defect_offsets

LOG2E = 1.4426950408889634
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
        lost_masses[(tiles, strips)](
            q,
            k,
            lost,
            parts,
            *q.stride()[:3],
            *k.stride()[:3],
            scale * LOG2E,
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
        mean_squares[(cdiv(samples, rows) * cdiv(n_k, 32), batch * heads)](
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
def _group_sum(x, ROWS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    """Sums over groups of `SIZE` adjacent columns, `[ROWS, GROUPS]`."""
    return tl.sum(tl.reshape(x, (ROWS, GROUPS, SIZE)), 2)


@triton.jit
def _whole_lost(sums, mass, top, ROWS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    """Mass that tokens of `SIZE` keys lose, from the sums of their logits; all keys are seen."""
    return mass - SIZE * tl.sum(tl.math.exp2(sums * (1.0 / SIZE) - top[:, None]), 1)


@triton.jit
def _masked_lost(
    s, real, seen, mass, top, ROWS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr
):
    """The same where keys are past the end, or not seen."""
    count = _group_sum(tl.where(real, 1.0, 0.0), ROWS, GROUPS, SIZE)
    hidden = _group_sum(tl.where(real & (seen == 0), 1.0, 0.0), ROWS, GROUPS, SIZE)
    mean = _group_sum(tl.where(real, s, 0.0), ROWS, GROUPS, SIZE) / tl.maximum(count, 1.0)
    whole = (hidden == 0) & (count > 0)
    weights = tl.where(whole, count * tl.math.exp2(tl.where(whole, mean - top[:, None], 0.0)), 0.0)
    return mass - tl.sum(weights, 1)


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
    n = tl.arange(0, BLOCK_N)
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
            mass = tl.sum(tl.math.exp2(s - peak[:, None]), 1)
            twos = _group_sum(s, ROWS, BLOCK_N // 2, 2)
            fours = _group_sum(twos, ROWS, BLOCK_N // 4, 2)
            eights = _group_sum(fours, ROWS, BLOCK_N // 8, 2)
            lost2 = _whole_lost(twos, mass, peak, ROWS, BLOCK_N // 2, 2)
            lost4 = _whole_lost(fours, mass, peak, ROWS, BLOCK_N // 4, 4)
            lost8 = _whole_lost(eights, mass, peak, ROWS, BLOCK_N // 8, 8)
            rest = mass
            if REST_MEAN:
                mean = tl.sum(eights, 1) * (1.0 / BLOCK_N)
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
            lost2 = _masked_lost(s, real, seen, mass, peak, ROWS, BLOCK_N // 2, 2)
            lost4 = _masked_lost(s, real, seen, mass, peak, ROWS, BLOCK_N // 4, 4)
            lost8 = _masked_lost(s, real, seen, mass, peak, ROWS, BLOCK_N // 8, 8)
            rest = mass
            if REST_MEAN:
                rest = _masked_lost(s, real, seen, mass, peak, ROWS, 1, BLOCK_N)
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
