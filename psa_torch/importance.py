"""How much each key block matters to each query block (specification, section 5).

Scores carry no gradient: levels are chosen, not learnt.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from psa_torch._checks import without_autocast
from psa_torch._config import parse_config
from psa_torch._dispatch import repeated, use_kernels
from psa_torch._eager import eager
from psa_torch._vmap import register_batch_rule
from psa_torch.defect import defect_scores
from psa_torch.pyramid import accumulator, group_means
from shared_specs.config import PSAConfig
from shared_specs.config_types import CallConfig
from shared_specs.geometry import cdiv
from shared_specs.sampling import SamplePlan

CHUNK_ELEMENTS = 1 << 22
"""Logits held at one time; the estimate never holds them all."""


def block_scores(q: Tensor, k: Tensor, config: CallConfig) -> Tensor:
    """Scores of every (query block, key block) pair by `config.importance`.

    Args:
        q: `[B, H, Lq, D]`.
        k: `[B, Hk, Lk, D]`, `H % Hk == 0`.
        config: block sizes, estimator and its parameters, `causal`, `scale`.

    Returns:
        float32 `[B, H, Nq, Nk]`, at least 0, comparable inside a row only; 0 where no sampled
        key is visible. For 'defect' `[B, H, Nq, Nk, 4]`: what the block loses at level 2, 4, 8
        and at rest. Detached from the graph of q and k.
    """
    return _eager_block_scores(q.detach(), k.detach(), config.to_json())


@torch.library.custom_op("psa::block_scores", mutates_args=())
@repeated
def _block_scores(q: Tensor, k: Tensor, config: str) -> Tensor:
    settings = parse_config(config)
    if settings.importance == "defect":
        estimate = defect_scores
        if use_kernels(q):
            from psa_torch.kernels import defect

            estimate = defect.defect_scores
        return estimate(
            q,
            k,
            block_m=settings.block_m,
            block_n=settings.block_n,
            sample_m=settings.resolved_sample_m,
            scale=settings.resolved_scale(q.shape[-1]),
            causal=settings.causal,
            rest_mean=settings.is_rest_mean,
        )
    if use_kernels(q):
        from psa_torch.kernels import scores

        return scores.block_scores(q, k, settings)
    estimators = {
        "pooled": pooled_scores,
        "sampled": sampled_scores,
        "antidiagonal": antidiagonal_scores,
    }
    with without_autocast(q):
        return estimators[settings.importance](q, k, settings)


@_block_scores.register_fake
def _(q, k, config):
    settings = parse_config(config)
    n_q, n_k = cdiv(q.shape[2], settings.block_m), cdiv(k.shape[2], settings.block_n)
    columns = (4,) if settings.importance == "defect" else ()
    return q.new_empty(*q.shape[:2], n_q, n_k, *columns, dtype=torch.float32)


register_batch_rule(_block_scores)
_eager_block_scores = eager(_block_scores)


def pooled_scores(q: Tensor, k: Tensor, config: PSAConfig) -> Tensor:
    """Rows and columns are means over groups of `importance_pool` adjacent tokens.

    Under a causal mask a group of keys is visible when its first key is at or before the last
    query of the group.
    """
    size = config.importance_pool
    rows = _groups(q, config.block_m, size)
    cols = _groups(k, config.block_n, size)
    rows = _Side(group_means(q, size, rows), *_spans(q, rows, size))
    cols = _Side(group_means(k, size, cols), *_spans(k, cols, size))
    return _scores(rows, cols, q, k, config, _largest_ratio)


def sampled_scores(q: Tensor, k: Tensor, config: PSAConfig) -> Tensor:
    """Rows and columns are tokens at fixed offsets of each block.

    Offsets past the end of the sequence are clamped to its last token. Under a causal mask a key
    is visible when it is at or before the query.
    """
    rows, cols = _sample(q, config.query_samples), _sample(k, config.key_samples)
    return _scores(rows, cols, q, k, config, _largest_ratio)


def antidiagonal_scores(q: Tensor, k: Tensor, config: PSAConfig) -> Tensor:
    """Softmax over tiles of the q.k sums along each tile's antidiagonal, summed over a block.

    A tile pairs `g = antidiagonal_stride` queries with `g` keys: query `i` meets key `g - 1 - i`.
    Tokens past the end of the sequence add nothing. Under a causal mask a tile is visible when
    its first key is at or before its last query.
    """
    size = config.antidiagonal_stride
    rows = _groups(q, config.block_m, size)
    cols = _groups(k, config.block_n, size)
    rows = _Side(_tiles(q, rows, size).flatten(-2), *_spans(q, rows, size))
    cols = _Side(_tiles(k, cols, size).flip(-2).flatten(-2), *_spans(k, cols, size))
    return _scores(rows, cols, q, k, config, _summed_softmax)


class _Side(NamedTuple):
    """Rows or columns of the logits, whole blocks of them.

    Attributes:
        tokens: `[B, H, N, D]`.
        first, last: int `[N]`, first and last token position that each stands for; a position
            past the end of the sequence marks padding.
    """

    tokens: Tensor
    first: Tensor
    last: Tensor


def _groups(x: Tensor, block: int, size: int) -> int:
    """Groups of `size` tokens in the whole blocks that hold `x`."""
    return cdiv(x.shape[2], block) * (block // size)


def _spans(x: Tensor, groups: int, size: int) -> tuple[Tensor, Tensor]:
    """First and last real token of each group; the first again where none is real."""
    first = torch.arange(groups, device=x.device) * size
    last = torch.where(first < x.shape[2], (first + size).clamp(max=x.shape[2]) - 1, first)
    return first, last


def _tiles(x: Tensor, tiles: int, size: int) -> Tensor:
    padding = tiles * size - x.shape[2]
    padded = torch.nn.functional.pad(x.to(accumulator(x)), (0, 0, 0, padding))
    return padded.unflatten(-2, (tiles, size))


def _sample(x: Tensor, plan: SamplePlan) -> _Side:
    offsets = _offsets(plan, x.device)
    starts = torch.arange(cdiv(x.shape[2], plan.block), device=x.device) * plan.block
    at = (starts[:, None] + offsets).flatten().clamp(max=x.shape[2] - 1)
    return _Side(x.index_select(2, at).to(accumulator(x)), at, at)


@functools.lru_cache(maxsize=64)
def _offsets(plan: SamplePlan, device: torch.device) -> Tensor:
    """A plan's offsets on a device, copied there once."""
    return torch.tensor(plan.offsets.tolist(), device=device)


def _scores(
    rows: _Side,
    cols: _Side,
    q: Tensor,
    k: Tensor,
    config: PSAConfig,
    reduce: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Block scores from rows and columns, in chunks of (batch and key head, query blocks)."""
    (b, h, q_len, head_dim), (_, h_kv, kv_len, _) = q.shape, k.shape
    block_m, block_n, is_causal = config.block_m, config.block_n, config.causal
    n_q, n_k, group = cdiv(q_len, block_m), cdiv(kv_len, block_n), h // h_kv
    m, n, d = rows.tokens.shape[2] // n_q, cols.tokens.shape[2] // n_k, rows.tokens.shape[3]
    scale = config.resolved_scale(head_dim)
    query = (rows.tokens * scale).reshape(b * h_kv, group, n_q, m, d)
    # Columns of one place in their block lie together, so that reductions over a block run
    # along an outer axis.
    key = cols.tokens.reshape(b * h_kv, n_k, n, d).transpose(1, 2).contiguous()
    col_first = cols.first.view(n_k, n).T
    row_last = rows.last.view(n_q, m)
    scores = query.new_zeros(b * h_kv, group, n_q, n_k, dtype=torch.float32)
    heads_per_chunk = max(1, CHUNK_ELEMENTS // (group * m * n * n_k))
    blocks_per_chunk = max(1, CHUNK_ELEMENTS // (heads_per_chunk * group * m * n * n_k))
    for block in range(0, n_q, blocks_per_chunk):
        taken = slice(block, min(block + blocks_per_chunk, n_q))
        seen = n_k
        if is_causal:
            last = min(taken.stop * block_m, q_len) - 1 + kv_len - q_len
            seen = min(max(last // block_n + 1, 0), n_k)
        if seen == 0:
            continue
        hidden = col_first[:, :seen] >= kv_len if kv_len % block_n else None
        if is_causal:
            at = row_last[taken, :, None, None] + (kv_len - q_len)
            later = col_first[:, :seen] > at
            hidden = later if hidden is None else hidden | later
        padding = (row_last[taken] >= q_len)[..., None]
        for head in range(0, b * h_kv, heads_per_chunk):
            mine = slice(head, head + heads_per_chunk)
            left = query[mine, :, taken]
            right = key[mine, :, :seen].flatten(1, 2).transpose(1, 2)
            logits = torch.bmm(left.flatten(1, 3), right)
            logits = logits.view(*left.shape[:4], n, seen)
            if hidden is not None:
                logits.masked_fill_(hidden, -torch.inf)
            scores[mine, :, taken, :seen] = reduce(logits, padding)
    return scores.view(b, h, n_q, n_k)


def _largest_ratio(logits: Tensor, padding: Tensor) -> Tensor:
    """exp(logit - row maximum), its largest value per block: `[..., m, n, Nk]` to `[..., Nk]`."""
    block = logits.amax(-2)
    top = block.amax(-1, keepdim=True)
    ratio = (block - top.masked_fill(top == -torch.inf, 0.0)).exp_()
    return ratio.masked_fill_(padding, 0.0).amax(-2)


def _summed_softmax(logits: Tensor, padding: Tensor) -> Tensor:
    """Softmax over a row, summed per block: `[..., m, n, Nk]` to `[..., Nk]`."""
    top = logits.amax((-1, -2), keepdim=True)
    weights = (logits - top.masked_fill(top == -torch.inf, 0.0)).exp_().sum(-2)
    total = weights.sum(-1, keepdim=True)
    weights = weights / total.masked_fill(total == 0, 1.0)
    return weights.masked_fill_(padding, 0.0).sum(-2)
