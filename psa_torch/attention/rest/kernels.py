"""The means of the rest as Triton kernels: one pass forward, two backward, no table, no gather.

Every program reads the levels of its rows and hides the means of blocks that are listed. Softmax
goes on from where the list left it: its lse is the first maximum, its output the first sum.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from psa_torch._triton.constants import LN2, LOG2E
from psa_torch._triton.launch import launch_kernel
from psa_torch.attention.rest.mean_kernel import dense_rows, load_rows, means_of_blocks, places
from psa_torch.attention.rest.means import Call
from psa_torch.kernels._launch import on_device_of, padded_head_dim, resident_programs
from shared_specs.geometry import cdiv

__all__ = ["add_gradients", "add_means", "means_of_blocks"]


@triton.jit
def _bias(first, levels, blocks, kv_len, BLOCK_N: tl.constexpr, N: tl.constexpr):
    """log2 of the keys under means `first … first + N - 1`, -inf where the block is listed; and
    the last key under each."""
    n = first + tl.arange(0, N)
    level = tl.load(levels + n, mask=n < blocks, other=1)
    count = tl.minimum(kv_len - n * BLOCK_N, BLOCK_N)
    bias = tl.log2(tl.maximum(count, 1).to(tl.float32))
    return tl.where(level == 0, bias, float("-inf")), n * BLOCK_N + count - 1


@triton.jit
def _visible_end(first, blocks, offset, BLOCK_N: tl.constexpr, N: tl.constexpr):
    """Means past this one are in the future of rows `first … first + N - 1`."""
    return tl.minimum(blocks, tl.maximum(first + N + offset, 0) // BLOCK_N + 1)


@triton.jit
def rest_forward(
    q_pointer,
    k_pointer,
    v_pointer,
    levels_pointer,
    out_pointer,
    lse_pointer,
    q_stride_b,
    q_stride_h,
    q_stride_m,
    scale,
    heads,
    group,
    q_len,
    kv_len,
    q_blocks,
    blocks,
    D: tl.constexpr,
    DV: tl.constexpr,
    WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    MEANS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
):
    """`ROWS` query rows of one head: out and lse of the list, joined by the means, in place.

    q strided, means `[B, Hk, Nk, D]`, levels, out and lse contiguous; scale times log2(e).
    """
    tiles = q_blocks * (BLOCK_M // ROWS)
    batch_head = (tl.program_id(0) // tiles).to(tl.int64)
    first = (tl.program_id(0) % tiles) * ROWS
    batch, head = batch_head // heads, batch_head % heads
    kv_head = batch * (heads // group) + head // group
    k_pointer += kv_head * blocks * D
    v_pointer += kv_head * blocks * DV
    out_pointer += batch_head * q_len * DV
    levels_pointer += (batch_head * q_blocks + first // BLOCK_M) * blocks

    m = first + tl.arange(0, ROWS)
    real = m < q_len
    at_head = batch * q_stride_b + head * q_stride_h
    q = load_rows(q_pointer + at_head, first, q_len, q_stride_m, WIDTH, D, ROWS)
    acc = load_rows(out_pointer, first, q_len, DV, V_WIDTH, DV, ROWS).to(tl.float32)
    top = tl.load(lse_pointer + batch_head * q_len + m, mask=real, other=float("-inf")) * LOG2E
    total = tl.where(top != float("-inf"), 1.0, 0.0)
    end = blocks
    if IS_CAUSAL:
        end = _visible_end(first, blocks, kv_len - q_len, BLOCK_N, ROWS)
    for n in tl.range(0, end, MEANS):
        bias, last = _bias(n, levels_pointer, blocks, kv_len, BLOCK_N, MEANS)
        k = load_rows(k_pointer, n, blocks, D, WIDTH, D, MEANS)
        v = load_rows(v_pointer, n, blocks, DV, V_WIDTH, DV, MEANS)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + bias[None, :]
        if IS_CAUSAL:
            s = tl.where(last[None, :] <= (m + (kv_len - q_len))[:, None], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        # A row that has seen nothing yet keeps -inf as its maximum, and must not subtract it.
        origin = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.math.exp2(s - origin[:, None])
        shrink = tl.math.exp2(top - origin)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    blind = total == 0
    total = tl.where(blind, 1.0, total)
    acc = acc / total[:, None]
    at, inside = places(out_pointer, first, q_len, DV, V_WIDTH, DV, ROWS)
    tl.store(at, acc.to(out_pointer.dtype.element_ty), mask=inside)
    lse = tl.where(blind, float("-inf"), (top + tl.log2(total)) * LN2)
    tl.store(lse_pointer + batch_head * q_len + m, lse, mask=real)


@triton.jit
def rest_query_gradient(
    q_pointer,
    k_pointer,
    v_pointer,
    levels_pointer,
    out_pointer,
    dout_pointer,
    lse_pointer,
    dlse_pointer,
    dq_pointer,
    lse2_pointer,
    delta_pointer,
    q_stride_b,
    q_stride_h,
    q_stride_m,
    dout_stride_b,
    dout_stride_h,
    dout_stride_m,
    scale,
    heads,
    group,
    q_len,
    kv_len,
    q_blocks,
    blocks,
    D: tl.constexpr,
    DV: tl.constexpr,
    WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    MEANS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_DLSE: tl.constexpr,
):
    """Adds to dq `[B, H, Lq, D]` in place, and leaves each row's delta and lse in base 2."""
    tiles = q_blocks * (BLOCK_M // ROWS)
    batch_head = (tl.program_id(0) // tiles).to(tl.int64)
    first = (tl.program_id(0) % tiles) * ROWS
    batch, head = batch_head // heads, batch_head % heads
    kv_head = batch * (heads // group) + head // group
    k_pointer += kv_head * blocks * D
    v_pointer += kv_head * blocks * DV
    dq_pointer += batch_head * q_len * D
    levels_pointer += (batch_head * q_blocks + first // BLOCK_M) * blocks

    m = first + tl.arange(0, ROWS)
    real = m < q_len
    at_head = batch * q_stride_b + head * q_stride_h
    q = load_rows(q_pointer + at_head, first, q_len, q_stride_m, WIDTH, D, ROWS)
    at_head = batch * dout_stride_b + head * dout_stride_h
    dout = load_rows(dout_pointer + at_head, first, q_len, dout_stride_m, V_WIDTH, DV, ROWS)
    out_pointer += batch_head * q_len * DV
    out = load_rows(out_pointer, first, q_len, DV, V_WIDTH, DV, ROWS)
    row = batch_head * q_len + m
    lse = tl.load(lse_pointer + row, mask=real, other=float("-inf"))
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    if HAS_DLSE:
        delta -= tl.load(dlse_pointer + row, mask=real, other=0.0)
    # With lse = inf all weights of a row that sees nothing are exactly 0.
    seen = lse != float("-inf")
    lse2 = tl.where(seen, lse * LOG2E, float("inf"))
    delta = tl.where(seen, delta, 0.0)
    tl.store(lse2_pointer + row, lse2, mask=real)
    tl.store(delta_pointer + row, delta, mask=real)

    dq = tl.zeros([ROWS, WIDTH], tl.float32)
    end = blocks
    if IS_CAUSAL:
        end = _visible_end(first, blocks, kv_len - q_len, BLOCK_N, ROWS)
    for n in tl.range(0, end, MEANS):
        bias, last = _bias(n, levels_pointer, blocks, kv_len, BLOCK_N, MEANS)
        k = load_rows(k_pointer, n, blocks, D, WIDTH, D, MEANS)
        v = load_rows(v_pointer, n, blocks, DV, V_WIDTH, DV, MEANS)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E) + bias[None, :]
        if IS_CAUSAL:
            s = tl.where(last[None, :] <= (m + (kv_len - q_len))[:, None], s, float("-inf"))
        p = tl.math.exp2(s - lse2[:, None])
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    at, inside = places(dq_pointer, first, q_len, D, WIDTH, D, ROWS)
    dq = dq * scale + tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, dq.to(dq_pointer.dtype.element_ty), mask=inside)


@triton.jit
def rest_key_gradient(
    q_pointer,
    k_pointer,
    v_pointer,
    levels_pointer,
    dout_pointer,
    lse2_pointer,
    delta_pointer,
    dk_pointer,
    dv_pointer,
    q_stride_b,
    q_stride_h,
    q_stride_m,
    dout_stride_b,
    dout_stride_h,
    dout_stride_m,
    scale,
    heads,
    group,
    q_len,
    kv_len,
    q_blocks,
    blocks,
    D: tl.constexpr,
    DV: tl.constexpr,
    WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    MEANS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
):
    """What a share of all queries owes `MEANS` means of one key head: float32 partial sums.

    The shares are parts of the sequence, one for each program along axis 1: their number is fixed
    by the sizes and the device, so the sum over them is the same every time.
    """
    tiles = (blocks + MEANS - 1) // MEANS
    kv_head = (tl.program_id(0) // tiles).to(tl.int64)
    n = (tl.program_id(0) % tiles) * MEANS
    kv_heads = heads // group
    batch = kv_head // kv_heads
    k = load_rows(k_pointer + kv_head * blocks * D, n, blocks, D, WIDTH, D, MEANS)
    v = load_rows(v_pointer + kv_head * blocks * DV, n, blocks, DV, V_WIDTH, DV, MEANS)
    dk = tl.zeros([MEANS, WIDTH], tl.float32)
    dv = tl.zeros([MEANS, V_WIDTH], tl.float32)

    rows = q_blocks * (BLOCK_M // ROWS)
    share = (rows + tl.num_programs(1) - 1) // tl.num_programs(1)
    start = tl.program_id(1) * share
    stop = tl.minimum(start + share, rows)
    if IS_CAUSAL:
        start = tl.maximum(start, (n * BLOCK_N - (kv_len - q_len)) // ROWS)
    for g in range(group):
        head = (kv_head % kv_heads) * group + g
        batch_head = batch * heads + head
        q_base = q_pointer + batch * q_stride_b + head * q_stride_h
        dout_base = dout_pointer + batch * dout_stride_b + head * dout_stride_h
        for t in tl.range(start, stop):
            first = t * ROWS
            levels = levels_pointer + (batch_head * q_blocks + first // BLOCK_M) * blocks
            bias, last = _bias(n, levels, blocks, kv_len, BLOCK_N, MEANS)
            q = load_rows(q_base, first, q_len, q_stride_m, WIDTH, D, ROWS)
            dout = load_rows(dout_base, first, q_len, dout_stride_m, V_WIDTH, DV, ROWS)
            m = first + tl.arange(0, ROWS)
            row = batch_head * q_len + m
            lse2 = tl.load(lse2_pointer + row, mask=m < q_len, other=float("inf"))
            delta = tl.load(delta_pointer + row, mask=m < q_len, other=0.0)
            s = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * LOG2E) + bias[:, None]
            if IS_CAUSAL:
                s = tl.where(last[:, None] <= (m + (kv_len - q_len))[None, :], s, float("-inf"))
            p = tl.math.exp2(s - lse2[None, :])
            dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
            dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    part = tl.program_id(1).to(tl.int64) * (tl.num_programs(0) // tiles) + kv_head
    d = tl.arange(0, WIDTH)
    e = tl.arange(0, V_WIDTH)
    mean = (part * blocks + n + tl.arange(0, MEANS))[:, None]
    inside = (n + tl.arange(0, MEANS) < blocks)[:, None]
    at = mean * D + d[None, :]
    tl.store(dk_pointer + at, dk * scale, mask=inside & (d < D)[None, :])
    at = mean * DV + e[None, :]
    tl.store(dv_pointer + at, dv, mask=inside & (e < DV)[None, :])


@torch.no_grad()
def add_means(q, k_means, v_means, levels, out, lse, g: Call) -> None:
    """As `psa_torch.attention.rest.plain.add_means`; float16, bfloat16 or float32."""
    q, levels = dense_rows(q), levels.contiguous()
    constants = _constants(q, v_means, g)
    tiles = levels.shape[2] * (g.block_m // constants["ROWS"])
    with on_device_of(q):
        launch_kernel(
            rest_forward,
            (tiles * q.shape[0] * q.shape[1],),
            q,
            k_means,
            v_means,
            levels,
            out,
            lse,
            *q.stride()[:3],
            g.scale * LOG2E.value,
            *_sizes(q, k_means, levels, g),
            **constants,
        )


@torch.no_grad()
def add_gradients(
    dout, dlse, q, k_means, v_means, levels, out, lse, dq, g: Call
) -> tuple[Tensor, Tensor]:
    """As `psa_torch.attention.rest.plain.add_gradients`."""
    parts = _parts_of_gradients(dout, dlse, q, k_means, v_means, levels, out, lse, dq, g)
    return tuple(x[0] if x.shape[0] == 1 else x.sum(0) for x in parts)


def _parts_of_gradients(
    dout, dlse, q, k_means, v_means, levels, out, lse, dq, g: Call
) -> tuple[Tensor, Tensor]:
    """Adds to `dq`; gradients of the means in parts to be added, `[parts, B, Hk, Nk, D]`."""
    q, dout, levels = dense_rows(q), dense_rows(dout), levels.contiguous()
    constants, sizes = _constants(q, v_means, g), _sizes(q, k_means, levels, g)
    rows = constants["ROWS"]
    tiles = levels.shape[2] * (g.block_m // rows)
    lse2, delta = torch.empty_like(lse), torch.empty_like(lse)
    strides = *q.stride()[:3], *dout.stride()[:3]
    key_tiles = cdiv(k_means.shape[2], constants["MEANS"]) * k_means.shape[0] * k_means.shape[1]
    parts = max(1, min(tiles, resident_programs(q, 4) // key_tiles))
    dk, dv = (lse.new_empty(parts, *x.shape) for x in (k_means, v_means))
    with on_device_of(q):
        launch_kernel(
            rest_query_gradient,
            (tiles * q.shape[0] * q.shape[1],),
            q,
            k_means,
            v_means,
            levels,
            out,
            dout,
            lse,
            None if dlse is None else dlse.contiguous(),
            dq,
            lse2,
            delta,
            *strides,
            g.scale,
            *sizes,
            HAS_DLSE=dlse is not None,
            **constants,
        )
        launch_kernel(
            rest_key_gradient,
            (key_tiles, parts),
            q,
            k_means,
            v_means,
            levels,
            dout,
            lse2,
            delta,
            dk,
            dv,
            *strides,
            g.scale,
            *sizes,
            **constants,
        )
    return dk, dv


def _sizes(q: Tensor, k_means: Tensor, levels: Tensor, g: Call) -> tuple[int, ...]:
    return q.shape[1], q.shape[1] // k_means.shape[1], g.q_len, g.kv_len, *levels.shape[2:]


def _constants(q: Tensor, v_means: Tensor, g: Call) -> dict:
    """Tiles that fit registers and shared memory; wide heads and float32 get half as many rows."""
    width, v_width = padded_head_dim(q.shape[3]), padded_head_dim(v_means.shape[3])
    wide = max(width, v_width) * q.element_size() > 256
    return {
        "D": q.shape[3],
        "DV": v_means.shape[3],
        "WIDTH": width,
        "V_WIDTH": v_width,
        "BLOCK_M": g.block_m,
        "BLOCK_N": g.block_n,
        "ROWS": min(64, g.block_m) if wide else g.block_m,
        "MEANS": 32 if wide else 64,
        "IS_CAUSAL": g.is_causal,
        "num_warps": 8 if g.block_m == 128 and not wide else 4,
        "num_stages": 1 if wide else 2,
    }
