"""All levels of keys and values in one pass (specification, section 2).

A program owns a run of groups of eight tokens and loads token 0, token 1, ... of all its groups
as eight separate tiles. The sums of 2, 4 and 8 are then plain additions of tiles: no reduction
across threads, and every load and store is whole rows.

Bytes: each input element is read once and 1.875 elements are written for it, the least that a
pyramid which includes level 1 can move, or 0.875 without level 1. At 75,600 keys, 24 heads,
D = 128, bfloat16: 0.93 GB read, 1.74 or 0.81 GB written, 0.56 or 0.36 ms at 4.8 TB/s.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from psa_torch._triton.launch import launch_kernel
from psa_torch.kernels._launch import next_power_of_2, on_device_of, require_dtype
from shared_specs.geometry import cdiv
from shared_specs.pyramid import padded_length, pyramid_rows

_TILE = 1024  # elements of one tile: one 16-byte load of 16-bit elements per thread of 4 warps


def build_pyramid(
    k: Tensor, v: Tensor, block_n: int, *, with_level_1: bool = True
) -> tuple[Tensor, Tensor]:
    """Keys and values pooled by 1, 2, 4 and 8, finest first, end to end.

    Args:
        k, v: `[B, Hk, Lk, D]`, each with a D of its own, any strides; float16, bfloat16 or float32.
        block_n: keys per block, a multiple of 8.
        with_level_1: whether the rows begin with the keys and values themselves.

    Returns:
        Two contiguous `[B, Hk, P, D]` in the input dtype, `P = pyramid_rows(Lk, block_n)`, or
        without level 1 `[B, Hk, P - padded_length(Lk, block_n), D]`. Means accumulate in
        float32; rows that cover no key are zero.

    Raises:
        TypeError: dtype other than the three.
    """
    for name, x in (("k", k), ("v", v)):
        require_dtype(name, x, (torch.float16, torch.bfloat16, torch.float32))
    batch, heads, kv_len, head_dim = k.shape
    value_dim = v.shape[3]
    padded = padded_length(kv_len, block_n)
    rows = pyramid_rows(kv_len, block_n) - (0 if with_level_1 else padded)
    k_rows, v_rows = (x.new_empty(batch, heads, rows, x.shape[3]) for x in (k, v))
    block_d, block_dv = next_power_of_2(head_dim), next_power_of_2(value_dim)
    groups = max(1, _TILE // max(block_d, block_dv))
    tiles = cdiv(padded // 8, groups)
    with on_device_of(k):
        launch_kernel(
            _pyramid_kernel,
            (tiles * batch * heads,),
            k,
            v,
            k_rows,
            v_rows,
            *k.stride(),
            *v.stride(),
            heads,
            kv_len,
            padded,
            rows,
            tiles,
            WITH_LEVEL_1=with_level_1,
            HEAD_DIM=head_dim,
            VALUE_DIM=value_dim,
            BLOCK_D=block_d,
            BLOCK_DV=block_dv,
            GROUPS=groups,
            num_warps=4,
        )
    return k_rows, v_rows


@triton.jit
def _pyramid_kernel(
    k_pointer,
    v_pointer,
    k_rows,
    v_rows,
    k_stride_b,
    k_stride_h,
    k_stride_l,
    k_stride_d,
    v_stride_b,
    v_stride_h,
    v_stride_l,
    v_stride_d,
    heads,
    kv_len,
    padded,
    rows,
    tiles,
    WITH_LEVEL_1: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Grid: (tiles of GROUPS groups of eight tokens) * batch * heads."""
    pid = tl.program_id(0)
    group = (pid % tiles) * GROUPS + tl.arange(0, GROUPS)
    batch_head = (pid // tiles).to(tl.int64)
    b = batch_head // heads
    h = batch_head % heads
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_DV)
    k_pointer += b * k_stride_b + h * k_stride_h
    v_pointer += b * v_stride_b + h * v_stride_h
    # Rows keep the numbers that they have in the whole pyramid.
    out = batch_head * rows - (0 if WITH_LEVEL_1 else padded)
    k_rows += out * HEAD_DIM
    v_rows += out * VALUE_DIM
    _pool_groups(
        k_pointer, k_rows, k_stride_l, k_stride_d, group, d, kv_len, padded, WITH_LEVEL_1, HEAD_DIM
    )
    _pool_groups(
        v_pointer, v_rows, v_stride_l, v_stride_d, group, e, kv_len, padded, WITH_LEVEL_1, VALUE_DIM
    )


@triton.jit
def _pool_groups(
    pointer,
    out,
    stride_l,
    stride_d,
    group,
    d,
    kv_len,
    padded,
    WITH_LEVEL_1: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Every level of the eight tokens of each group; out is one head's rows."""
    eight = tl.zeros((group.shape[0], d.shape[0]), tl.float32)
    for half in tl.static_range(2):
        four = tl.zeros((group.shape[0], d.shape[0]), tl.float32)
        for pair in tl.static_range(2):
            two = tl.zeros((group.shape[0], d.shape[0]), tl.float32)
            for one in tl.static_range(2):
                token = group * 8 + (half * 4 + pair * 2 + one)
                real = (token < kv_len)[:, None] & (d < HEAD_DIM)[None, :]
                at = token.to(tl.int64)[:, None] * stride_l + d.to(tl.int64)[None, :] * stride_d
                x = tl.load(pointer + at, mask=real, other=0.0)
                if WITH_LEVEL_1:
                    _store_rows(out, x, token, d, padded, HEAD_DIM)
                two += x.to(tl.float32)
            _store_mean(out, two, group * 4 + (half * 2 + pair), 1, d, kv_len, padded, HEAD_DIM)
            four += two
        _store_mean(out, four, group * 2 + half, 2, d, kv_len, padded, HEAD_DIM)
        eight += four
    _store_mean(out, eight, group, 3, d, kv_len, padded, HEAD_DIM)


@triton.jit
def _store_mean(out, total, index, LOG: tl.constexpr, d, kv_len, padded, HEAD_DIM: tl.constexpr):
    """Row `index` of level `2 ** LOG`: the total over the tokens it really covers."""
    SIZE: tl.constexpr = 1 << LOG
    covered = tl.minimum(tl.maximum(kv_len - index * SIZE, 1), SIZE)
    start = 2 * padded - (2 * padded >> LOG)
    row = tl.where(index < (padded >> LOG), start + index, 2 * padded)  # past the end: not stored
    _store_rows(out, total / covered.to(total.dtype)[:, None], row, d, 2 * padded, HEAD_DIM)


@triton.jit
def _store_rows(out, x, row, d, limit, HEAD_DIM: tl.constexpr):
    inside = (row < limit)[:, None] & (d < HEAD_DIM)[None, :]
    at = row.to(tl.int64)[:, None] * HEAD_DIM + d[None, :]
    tl.store(out + at, x.to(out.dtype.element_ty), mask=inside)
