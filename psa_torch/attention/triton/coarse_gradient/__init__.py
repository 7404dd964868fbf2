"""dk and dv of a coarse level: sums per query block, then sums over query blocks.

A key block has few rows of a coarse level, too few to pay for reading a block of queries. So one
kernel (`partials`) takes a query block at a time, whose rows of the level fill whole tiles, and
writes what it adds to each key block it sees into a slot of that pair; a second one (`sums`) adds
the slots up. Slots are addressed by head, query block and key block: no atomics, no counting, a
fixed order of addition. The work goes in `rounds`, so that the slots fit a workspace of bounded
size: a few key heads at a time, or, where one head alone has too many slots, a few query blocks of
every head, whose sums are then read and written again in every round.
"""

import math

from torch import Tensor

from psa_torch._triton.launch import launch_kernel
from psa_torch.attention.triton.coarse_gradient.partials import coarse_partials
from psa_torch.attention.triton.coarse_gradient.rounds import share_out
from psa_torch.attention.triton.coarse_gradient.sums import (
    LIST_WIDTH,
    SLOTS_AT_ONCE,
    WARP_BYTES,
    coarse_sums,
)
from psa_torch.attention.triton.configs import CoarseGradConfig, widths
from psa_torch.attention.triton.plan import Plan
from psa_torch.attention.triton.row_statistics import RowStatistics
from psa_torch.attention.triton.rows import Rows
from psa_torch.kernels._launch import resident_programs
from shared_specs.geometry import Geometry

PROGRAMS_PER_PROCESSOR = 2
"""Programs of `coarse_partials` that share a multiprocessor."""


def launch_coarse_gradient(
    q: Tensor,
    rows: Rows,
    dout: Tensor,
    statistics: RowStatistics,
    by_query: Plan,
    by_key: Plan,
    pooled: Tensor,
    geometry: Geometry,
    *,
    g: int,
    scale: float,
    config: CoarseGradConfig,
) -> None:
    """Level `2**g > 1` of the gradients, into its rows of `pooled`.

    Args:
        by_query, by_key: the plans of the level mask.
        pooled: float32 `[2, B, Hk, P - Lk', max(D, Dv)]`, whose rows of coarser levels are
            complete.
    """
    batch, heads, q_len, head_dim = q.shape
    k, v, head_rows, skipped = rows.of_level(g)
    kv_heads = k.shape[1]
    row = max(head_dim, v.shape[3])
    columns = widths(head_dim, v.shape[3])
    width = max(columns["WIDTH"], columns["V_WIDTH"])
    group = heads // kv_heads
    padded_len = geometry.padded_len
    q_blocks, k_blocks = by_query.entries.shape[2:]
    slot_rows = padded_len >> g
    rounds = share_out(
        batch * kv_heads,
        group,
        q_blocks,
        2 * slot_rows * row * q.element_size(),
        config.workspace,
        resident_programs(q, PROGRAMS_PER_PROCESSOR),
    )
    slots = q.new_empty(2, rounds.heads_per_round * group, rounds.queries_per_round, slot_rows, row)
    # A power of two near `scale`, so that a slot of dk has the size of dk; 1 for scale 0.
    dk_unit = 2.0 ** max(-32, min(32, math.frexp(scale)[1]))
    log_block_n = geometry.block_n.bit_length() - 1
    slot_bytes = (geometry.block_n >> g) * width * q.element_size()
    for part in rounds.places():
        place = (part.first_head * group, part.first_query, rounds.queries_per_round)
        launch_kernel(
            coarse_partials,
            (part.queries, part.heads * group),
            q,
            k,
            v,
            dout,
            statistics.lse2,
            statistics.delta,
            *by_query,
            slots[0],
            slots[1],
            *q.stride()[:2],
            *dout.stride()[:2],
            scale,
            dk_unit,
            heads,
            group,
            q_len,
            geometry.kv_len,
            padded_len,
            head_rows,
            skipped,
            q_blocks,
            k_blocks,
            *place,
            Q_STRIDE_M=q.stride(2),
            DOUT_STRIDE_M=dout.stride(2),
            **columns,
            BLOCK_M=geometry.block_m,
            LOG_BLOCK_N=log_block_n,
            G=g,
            TILE=config.tile,
            ROWS=config.rows,
            STAGES=config.stages,
            IS_CAUSAL=geometry.is_causal,
            num_warps=config.warps,
            num_stages=config.stages,
        )
        launch_kernel(
            coarse_sums,
            (k_blocks, part.heads, 2),
            slots,
            by_key.entries,
            by_key.counts,
            pooled,
            slots[0].numel(),
            pooled[0].numel(),
            dk_unit,
            group,
            padded_len,
            q_blocks,
            k_blocks,
            *place,
            D=head_dim,
            DV=v.shape[3],
            WIDTH=width,
            LOG_BLOCK_N=log_block_n,
            G=g,
            SLOTS=SLOTS_AT_ONCE,
            LIST=LIST_WIDTH,
            FIRST_ROUND=part.first_query == 0,
            num_warps=max(1, min(4, slot_bytes // WARP_BYTES)),
        )
