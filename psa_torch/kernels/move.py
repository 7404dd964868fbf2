"""Tokens into an order: q, k and v in one launch, an output or a gradient in another.

A program copies some rows of one head: their places are read first, then whole rows, so that reads
and writes are of full lines. At 75,600 tokens, 40 heads, D = 128, bfloat16 q, k and v are 2.3 GB
read and as much written, 1.0 ms at 4.8 TB/s.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from psa_torch._triton.launch import launch_kernel
from psa_torch.kernels._launch import next_power_of_2, on_device_of
from shared_specs.geometry import cdiv

TILE_BYTES = 16_384
"""Bytes that a program moves, near enough."""

MAX_WIDTH = 512
"""Channels of a row that one program moves; hidden states of a model have thousands."""


def move(q: Tensor, k: Tensor, v: Tensor, q_order: Tensor, kv_order: Tensor) -> list[Tensor]:
    """`q`, `k` and `v` with their tokens in an order each.

    Args:
        q: `[B, H, L, D]`, any strides.
        k, v: `[B, Hk, L, D]`, any strides.
        q_order, kv_order: int32 `[L]`, or `[B, h, L]` where h divides the heads.

    Returns:
        The three, contiguous.
    """
    moved = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    _launch((q, k, v), moved, (q_order, kv_order), k.shape[1])
    return moved


def move_one(x: Tensor, order: Tensor) -> Tensor:
    """`x [B, H, L, D]` with its tokens in an order: int32 `[L]`, or `[B, h, L]`."""
    moved = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch((x, x, x), [moved] * 3, (order, order), 0)
    return moved


def _launch(tensors, moved, orders, kv_heads: int) -> None:
    batch, heads, length, head_dim = tensors[0].shape
    if not moved[0].numel():
        return
    orders = [order.contiguous() for order in orders]
    width = min(next_power_of_2(head_dim), MAX_WIDTH)
    rows = max(1, TILE_BYTES // (width * tensors[0].element_size()))
    tiles = cdiv(length, rows) * cdiv(head_dim, width)
    with on_device_of(tensors[0]):
        launch_kernel(
            _move_kernel,
            (tiles, batch * (heads + 2 * kv_heads)),
            *tensors,
            *moved,
            *orders,
            *(stride for x in tensors for stride in x.stride()),
            *_order_strides(orders[0], heads),
            *_order_strides(orders[1], max(1, kv_heads)),
            heads,
            kv_heads,
            length,
            HEAD_DIM=head_dim,
            BLOCK_D=width,
            ROWS=rows,
            num_warps=4,
        )


def _order_strides(order: Tensor, heads: int) -> tuple[int, int, int]:
    """Strides of batch and heads, and how many heads share an entry."""
    if order.ndim == 1:
        return 0, 0, 1
    return order.stride(0), order.stride(1), max(1, heads // order.shape[1])


@triton.jit
def _move_kernel(
    Q,
    K,
    V,
    MOVED_Q,
    MOVED_K,
    MOVED_V,
    Q_ORDER,
    KV_ORDER,
    q_stride_b,
    q_stride_h,
    q_stride_l,
    q_stride_d,
    k_stride_b,
    k_stride_h,
    k_stride_l,
    k_stride_d,
    v_stride_b,
    v_stride_h,
    v_stride_l,
    v_stride_d,
    q_order_b,
    q_order_h,
    q_group,
    kv_order_b,
    kv_order_h,
    kv_group,
    heads,
    kv_heads,
    length,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Grid: tiles of rows * tiles of channels, batch * (heads of q, of k, of v)."""
    every = heads + 2 * kv_heads
    b = (tl.program_id(1) // every).to(tl.int64)
    h = (tl.program_id(1) % every).to(tl.int64)
    if h < heads:
        _move_rows(
            Q + b * q_stride_b + h * q_stride_h,
            MOVED_Q + (b * heads + h) * length * HEAD_DIM,
            Q_ORDER + b * q_order_b + (h // q_group) * q_order_h,
            q_stride_l,
            q_stride_d,
            length,
            HEAD_DIM,
            BLOCK_D,
            ROWS,
        )
    elif h < heads + kv_heads:
        h -= heads
        _move_rows(
            K + b * k_stride_b + h * k_stride_h,
            MOVED_K + (b * kv_heads + h) * length * HEAD_DIM,
            KV_ORDER + b * kv_order_b + (h // kv_group) * kv_order_h,
            k_stride_l,
            k_stride_d,
            length,
            HEAD_DIM,
            BLOCK_D,
            ROWS,
        )
    else:
        h -= heads + kv_heads
        _move_rows(
            V + b * v_stride_b + h * v_stride_h,
            MOVED_V + (b * kv_heads + h) * length * HEAD_DIM,
            KV_ORDER + b * kv_order_b + (h // kv_group) * kv_order_h,
            v_stride_l,
            v_stride_d,
            length,
            HEAD_DIM,
            BLOCK_D,
            ROWS,
        )


@triton.jit
def _move_rows(
    X,
    MOVED,
    ORDER,
    stride_l,
    stride_d,
    length,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The rows of one tile of one head."""
    PARTS: tl.constexpr = (HEAD_DIM + BLOCK_D - 1) // BLOCK_D
    row = tl.program_id(0) // PARTS * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(0) % PARTS * BLOCK_D + tl.arange(0, BLOCK_D)
    real = row < length
    mask = real[:, None] & (d < HEAD_DIM)[None, :]
    token = tl.load(ORDER + row, mask=real, other=0).to(tl.int64)
    x = tl.load(X + token[:, None] * stride_l + d[None, :] * stride_d, mask=mask)
    tl.store(MOVED + row.to(tl.int64)[:, None] * HEAD_DIM + d[None, :], x, mask=mask)
