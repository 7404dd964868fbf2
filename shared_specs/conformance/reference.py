"""The NumPy specification as an adapter: passes every case by construction of the answers."""

from __future__ import annotations

from typing import Any

from shared_specs import attention, order, selection
from shared_specs.conformance.adapter import Adapter
from shared_specs.table import build_table


class NumpyAdapter(Adapter):
    """`shared_specs` itself; works in float64 whatever dtype is asked for."""

    name = "numpy"

    def select(self, scores, config, *, q_len, kv_len, cap):
        return selection.select_levels(scores, config, q_len=q_len, kv_len=kv_len, cap=cap)

    def table(self, levels, *, transposed):
        return build_table(levels, transposed=transposed)

    def forward(
        self, q, k, v, levels, *, block_m, block_n, scale, is_causal, dtype, q_lens=None,
        kv_lens=None,
    ):  # fmt: skip
        return attention.sparse_attention(
            q,
            k,
            v,
            levels,
            block_m=block_m,
            block_n=block_n,
            scale=scale,
            is_causal=is_causal,
            q_lens=q_lens,
            kv_lens=kv_lens,
            return_lse=True,
        )

    def backward(
        self, q, k, v, levels, dout, dlse, *, block_m, block_n, scale, is_causal, dtype,
        q_lens=None, kv_lens=None,
    ):  # fmt: skip
        return attention.sparse_attention_grad(
            q,
            k,
            v,
            levels,
            dout,
            block_m=block_m,
            block_n=block_n,
            scale=scale,
            is_causal=is_causal,
            q_lens=q_lens,
            kv_lens=kv_lens,
            dlse=dlse,
        )

    def order(self, method, grid: Any, tile: Any):
        return order.gilbert_order(grid) if method == "Gilbert" else order.sta_order(grid, tile)


adapter = NumpyAdapter()
