"""Pyramid sparse attention with a token order, from q, k, v to the output, in NumPy."""

import numpy as np

from shared_specs.attention import sparse_attention
from shared_specs.importance import block_scores
from shared_specs.masks import density
from shared_specs.order import TokenOrder
from shared_specs.selection import candidate_blocks, select_levels
from shared_specs.similarity import similarity_cap


def reference(q, k, v, config):
    """out `[B, H, Lq, D]` and lse `[B, H, Lq]`, float64, and the density of each head."""
    lengths = {"q_len": q.shape[2], "kv_len": k.shape[2]}
    order = TokenOrder.from_config(config, *lengths.values())
    q, k, v, state = order.apply(*map(np.asarray, (q, k, v)))
    cap = similarity_cap(k, config) if config.use_sim_mask else None
    levels = select_levels(block_scores(q, k, config), config, **lengths, cap=cap)
    out, lse = sparse_attention(
        q,
        k,
        v,
        levels,
        block_m=config.block_m,
        block_n=config.block_n,
        scale=config.scale,
        is_causal=config.causal,
        rest=config.rest,
        return_lse=True,
    )
    candidates = candidate_blocks(*lengths.values(), config)
    heads = range(q.shape[1])
    counted = {"candidates": candidates, "rest_share": config.rest_share}
    densities = [density(levels[:, head], **counted) for head in heads]
    return order.undo(out, state), order.undo(lse, state), densities
