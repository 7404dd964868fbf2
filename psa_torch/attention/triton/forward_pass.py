"""Forward of pyramid sparse attention: one online softmax over the tiles of the table."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from psa_torch._triton.constants import LN2, LOG2E, LOWEST
from psa_torch._triton.launch import launch_kernel
from psa_torch.attention.triton import configs
from psa_torch.attention.triton.columns import in_columns, load_columns
from psa_torch.attention.triton.configs import ForwardConfig, HopperForwardConfig
from psa_torch.attention.triton.plan import Plan, query_plan
from psa_torch.attention.triton.rows import (
    Rows,
    aligned_rows,
    rows_in_place,
    rows_of_pyramid,
)
from psa_torch.attention.triton.walk import (
    gather_rows,
    in_full_tiles,
    load4,
    select4,
    tail_length,
    tail_rows,
)
from psa_torch.kernels._launch import on_device_of
from psa_torch.pyramid import Pyramid, build_pyramid
from shared_specs.geometry import Geometry, cdiv


@triton.jit
def _add_tile(q, k, v, acc, top, total, scale, bias):
    """One tile of one level: the scalar log2 bias folds into the running maximum."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    new_top = tl.maximum(top, tl.max(s, 1) * scale + bias)
    p = tl.math.exp2(s * scale - (new_top - bias)[:, None])
    shrink = tl.math.exp2(top - new_top)
    total = total * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return acc, new_top, total


@triton.jit
def _add_masked_tile(
    q, k, v, acc, top, total, scale, bias, last, position, IS_CAUSAL: tl.constexpr
):
    """One tile with a bias per column (-inf: not there) and, when causal, a mask per element."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + bias[None, :]
    if IS_CAUSAL:
        s = tl.where(last[None, :] <= position[:, None], s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1))
    p = tl.math.exp2(s - new_top[:, None])
    shrink = tl.math.exp2(top - new_top)
    total = total * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return acc, new_top, total


@triton.jit
def attention_forward(
    q_pointer,
    k_pointer,
    v_pointer,
    entries,
    counts,
    full_counts,
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
    padded_len,
    q_blocks,
    k_blocks,
    D: tl.constexpr,
    DV: tl.constexpr,
    WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LOG_BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    TAIL: tl.constexpr,
    STAGES: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    NEGATE: tl.constexpr,
):
    """`ROWS` query rows of one head. `scale` is `|scale| * log2(e)`; NEGATE: scale was negative.

    q `[B,H,Lq,D]` strided; k, v pyramids `[B,Hk,P,D]`, `[B,Hk,P,DV]`, out `[B,H,Lq,DV]`, lse
    `[B,H,Lq]`, tables, all contiguous. WIDTH, V_WIDTH: columns multiplied (see `columns`).
    """
    # Late query blocks have the most to do under a causal mask: they start first.
    part = tl.num_programs(0) - 1 - tl.program_id(0) if IS_CAUSAL else tl.program_id(0)
    batch_head = tl.program_id(1)
    batch = batch_head // heads
    head = batch_head % heads
    kv_head = batch.to(tl.int64) * (heads // group) + head // group
    pyramid = kv_head * (2 * padded_len - padded_len // 8)
    k_pointer += pyramid * D
    v_pointer += pyramid * DV

    m = part * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)[None, :]
    e = tl.arange(0, V_WIDTH)[None, :]
    q_pointer += batch.to(tl.int64) * q_stride_b + head.to(tl.int64) * q_stride_h
    q = tl.load(
        q_pointer + m.to(tl.int64)[:, None] * q_stride_m + d,
        mask=in_columns(m[:, None] < q_len, d, D, WIDTH),
        other=0.0,
    )
    if NEGATE:
        q = (-q.to(tl.float32)).to(q.dtype)

    table_row = batch_head * q_blocks + part * ROWS // BLOCK_M
    n = load4(counts, table_row)
    u = load4(full_counts, table_row)
    n0, n1, n2, _ = n
    entries += table_row.to(tl.int64) * k_blocks

    done = in_full_tiles(u, LOG_BLOCK_N, TILE)
    done0, done1, done2, done3 = done
    acc = tl.zeros([ROWS, V_WIDTH], tl.float32)
    top = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)

    if CONTIGUOUS:
        PARTS: tl.constexpr = (1 << LOG_BLOCK_N) // TILE
        for t in tl.range(0, u[0] * PARTS, num_stages=STAGES):
            first = (tl.load(entries + t // PARTS) << LOG_BLOCK_N) + t % PARTS * TILE
            at = (first + tl.arange(0, TILE))[:, None]
            k = load_columns(k_pointer + (at * D + d), d, D, WIDTH)
            v = load_columns(v_pointer + (at * DV + e), e, DV, V_WIDTH)
            acc, top, total = _add_tile(q, k, v, acc, top, total, scale, 0.0)
        full0 = 0
    else:
        full0 = done0 // TILE
    end1 = full0 + done1 // TILE
    end2 = end1 + done2 // TILE
    end3 = end2 + done3 // TILE
    for t in tl.range(0, end3, num_stages=STAGES):
        g = (t >= full0).to(tl.int32) + (t >= end1).to(tl.int32) + (t >= end2).to(tl.int32)
        level_entry = select4(g, 0, n0, n0 + n1, n0 + n1 + n2)
        position = (t - select4(g, 0, full0, end1, end2)) * TILE + tl.arange(0, TILE)
        rows = gather_rows(entries, level_entry, position, g, padded_len, LOG_BLOCK_N)
        k = load_columns(k_pointer + (rows[:, None] * D + d), d, D, WIDTH)
        v = load_columns(v_pointer + (rows[:, None] * DV + e), e, DV, V_WIDTH)
        acc, top, total = _add_tile(q, k, v, acc, top, total, scale, g.to(tl.float32))

    # Branch-free: an `if` here makes ptxas serialise the tensor-core products of the loop above.
    left = tail_length(n, done, LOG_BLOCK_N)
    for first in tl.range(0, left, TAIL, num_stages=1):
        rows, last, bias = tail_rows(
            entries, first + tl.arange(0, TAIL), n, done, padded_len, kv_len, LOG_BLOCK_N
        )
        real = (bias > float("-inf"))[:, None]
        at = rows[:, None]
        k = tl.load(k_pointer + (at * D + d), mask=in_columns(real, d, D, WIDTH), other=0.0)
        v = tl.load(v_pointer + (at * DV + e), mask=in_columns(real, e, DV, V_WIDTH), other=0.0)
        position = m + (kv_len - q_len)
        acc, top, total = _add_masked_tile(
            q, k, v, acc, top, total, scale, bias, last, position, IS_CAUSAL
        )

    seen = total != 0  # NaN, past the range of float32, is not nothing
    acc = acc * tl.where(seen, 1.0 / tl.where(seen, total, 1.0), 0.0)[:, None]
    lse = (top + tl.math.log2(tl.where(seen, total, 1.0))) * LN2
    out_row = batch_head.to(tl.int64) * q_len + m
    tl.store(
        out_pointer + out_row[:, None] * DV + e,
        acc.to(out_pointer.dtype.element_ty),
        mask=in_columns(m[:, None] < q_len, e, DV, V_WIDTH),
    )
    tl.store(lse_pointer + out_row, tl.where(seen, lse, float("-inf")), mask=m < q_len)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    levels: Tensor,
    *,
    block_m: int,
    block_n: int,
    scale: float,
    is_causal: bool,
    config: ForwardConfig | HopperForwardConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp at the given levels.

    Args:
        q: `[B, H, Lq, D]`; k: `[B, Hk, Lk, D]`; v: `[B, Hk, Lk, Dv]`; float32, float16 or
            bfloat16.
        levels: int32 `[B, H, Nq, Nk]`.
        block_m, block_n: queries and keys per block.
        scale: factor on q.k, of any sign.
        is_causal: the last query sees the last key.
        config: tile sizes; None takes them from `configs`.

    Returns:
        out `[B, H, Lq, Dv]` in the input dtype and lse float32 `[B, H, Lq]`, natural log,
        -inf where a row sees nothing. Contiguous.
    """
    geometry = Geometry(q.shape[2], k.shape[2], block_m, block_n, is_causal)
    plan = query_plan(levels, geometry)
    config = config or configs.forward_config(q, v, block_m, block_n)
    pool = rows_in_place if isinstance(config, HopperForwardConfig) else build_pyramid
    return forward_planned(q, pool(k, v, block_n), plan, geometry, scale=scale, config=config)


def forward_planned(
    q: Tensor,
    pyramid: Pyramid | Rows,
    plan: Plan,
    geometry: Geometry,
    *,
    scale: float,
    config: ForwardConfig | HopperForwardConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """`forward` for a pyramid and a plan that exist already; the part that benchmarks time.

    `Rows` are for the warp-specialised kernel, which takes either.
    """
    heads, kv_heads = q.shape[1], pyramid.k.shape[1]
    block_m, block_n = geometry.block_m, geometry.block_n
    config = config or configs.forward_config(q, pyramid.v, block_m, block_n)
    for_copies = isinstance(config, HopperForwardConfig)
    q = aligned_rows(q) if for_copies else configs.rows_contiguous(q)
    out = q.new_empty(*q.shape[:3], pyramid.v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    arguments = (
        *plan,
        out,
        lse,
        *q.stride()[:3],
        abs(scale) * LOG2E.value,
        heads,
        heads // kv_heads,
        geometry.q_len,
        geometry.kv_len,
        geometry.padded_len,
        plan.entries.shape[2],
        plan.entries.shape[3],
    )
    constants = dict(IS_CAUSAL=geometry.is_causal, NEGATE=scale < 0)
    with on_device_of(q):
        if for_copies:
            # Gluon kernels cannot be interpreted: nothing else may import them.
            from psa_torch.attention.triton.hopper import forward as hopper_forward

            launch = hopper_forward.launch
            pyramid = pyramid if isinstance(pyramid, Rows) else rows_of_pyramid(pyramid)
        else:
            launch = _launch
        launch(q, pyramid, arguments, config, block_m=block_m, block_n=block_n, **constants)
    return out, lse


def _launch(
    q: Tensor,
    pyramid: Pyramid,
    arguments: tuple,
    config: ForwardConfig,
    *,
    block_m: int,
    block_n: int,
    **constants,
) -> None:
    batch, heads, q_len, head_dim = q.shape
    launch_kernel(
        attention_forward,
        (cdiv(q_len, config.rows), batch * heads),
        q,
        *pyramid,
        *arguments,
        **configs.widths(head_dim, pyramid.v.shape[3]),
        BLOCK_M=block_m,
        LOG_BLOCK_N=block_n.bit_length() - 1,
        ROWS=config.rows,
        TILE=config.tile,
        TAIL=config.tail,
        STAGES=config.stages,
        CONTIGUOUS=config.contiguous and config.tile <= block_n,
        num_warps=config.warps,
        num_stages=config.stages,
        # Unfused, scaled logits round as their maximum does, and no weight exceeds 1 however
        # large they are. Fused, that holds up to logits of 2**31; float32 inputs reach more.
        enable_fp_fusion=q.dtype != torch.float32,
        **constants,
    )
