"""From scores to levels (specification, section 6). Every step is integer or exact."""

import math

import torch
from torch import Tensor

from psa_torch._checks import describe
from psa_torch._config import parse_config
from psa_torch._dispatch import repeated, use_kernels
from psa_torch._eager import eager
from psa_torch._vmap import register_batch_rule
from psa_torch.budget import budget_levels
from shared_specs.config import PSAConfig
from shared_specs.config_types import CallConfig
from shared_specs.selection import check_scores


def select_levels(
    scores: Tensor,
    config: CallConfig,
    *,
    q_len: int,
    kv_len: int,
    cap: Tensor | None = None,
) -> Tensor:
    """Levels of every (query block, key block) pair, without host synchronisation.

    Args:
        scores: float32 `[B, H, Nq, Nk]`, at least 0. NaN ranks last. A negative score is refused
            on the CPU; on a GPU, where looking would make the host wait, it counts as 0.
            In the mode 'budget' defects, `[B, H, Nq, Nk, 4]`, which are finite or NaN.
        config: ratios or budget, mode, and the text, sink and causal rules.
        q_len, kv_len: tokens; `Nq = ceil(q_len / block_m)`, `Nk = ceil(kv_len / block_n)`.
        cap: int32 `[B, Hk, Nk]` from `similarity.similarity_cap`, `H % Hk == 0`, or None;
            None in the mode 'budget'.

    Returns:
        int32 `[B, H, Nq, Nk]`, values in {0, 1, 2, 4, 8}, at least one above 0 in every row.
        No gradient flows from it to the scores.

    Raises:
        TypeError: scores are not float32, or the cap does not hold integers.
        ValueError: shapes do not fit the lengths, (on the CPU) a score is negative or a defect
            infinite, or a budget has costs that do not fit int32 or a cap.
    """
    described = None if cap is None else describe("cap", cap)
    check_scores(describe("scores", scores), described, config, q_len, kv_len)
    return _eager_select_levels(scores.detach(), cap, q_len, kv_len, config.to_json())


@torch.library.custom_op("psa::select_levels", mutates_args=())
@repeated
def _select_levels(
    scores: Tensor, cap: Tensor | None, q_len: int, kv_len: int, config: str
) -> Tensor:
    settings = parse_config(config)
    if settings.mask_mode == "budget":
        if use_kernels(scores):
            from psa_torch.kernels import budget

            return budget.budget_levels(scores, settings, q_len=q_len, kv_len=kv_len)
        return _plain_budget_levels(scores, q_len, kv_len, settings)
    if use_kernels(scores):
        from psa_torch.kernels import select

        return select.select_levels(scores, settings, q_len=q_len, kv_len=kv_len, cap=cap)
    return _plain_select_levels(scores, cap, q_len, kv_len, settings)


@_select_levels.register_fake
def _(scores, cap, q_len, kv_len, config):
    return scores.new_empty(scores.shape[:4], dtype=torch.int32)


register_batch_rule(_select_levels)
_eager_select_levels = eager(_select_levels)


def _plain_select_levels(
    scores: Tensor, cap: Tensor | None, q_len: int, kv_len: int, config: PSAConfig
) -> Tensor:
    _refuse_negative(scores)
    n_q, n_k = scores.shape[2:]
    rows = _Rows(n_q, q_len, kv_len, config, scores.device)
    candidates = rows.candidates(n_k)
    ranked, ranked_bits = _rank(scores, candidates)
    if config.mask_mode == "topk":
        last_ranks = _topk_ends(candidates, config)
    else:
        last_ranks = _thresholdbound_ends(ranked_bits, candidates, config)
    rank = torch.arange(n_k, device=scores.device)
    by_rank = torch.zeros_like(ranked, dtype=torch.int32)
    # From the last range to the first, each overwriting the start of the one after it.
    for level, end in reversed(last_ranks):
        by_rank = torch.where(rank < end[..., None], level, by_rank)
    chosen = torch.empty_like(by_rank).scatter_(-1, ranked, by_rank)
    if cap is not None:
        per_head = cap.repeat_interleave(scores.shape[1] // cap.shape[1], 1)
        chosen = torch.minimum(chosen, per_head[:, :, None, :].int())
    chosen = torch.where(_forced_blocks(rows, n_k, kv_len, config), 1, chosen)
    chosen = torch.where(rank < candidates[:, None], chosen, 0)
    return _fill_empty_rows(chosen, ranked)


def _plain_budget_levels(defects: Tensor, q_len: int, kv_len: int, config: PSAConfig) -> Tensor:
    _refuse_negative(defects)
    if defects.device.type == "cpu" and defects.isinf().any():
        raise ValueError("scores must be finite or NaN with mask_mode='budget', got inf")
    n_q, n_k = defects.shape[2:4]
    rows = _Rows(n_q, q_len, kv_len, config, defects.device)
    candidates = rows.candidates(n_k)
    # W of `shared_specs.budget.cost_limits`, in the same float64 product.
    n = candidates[:, None] if config.budget_scope == "row" else candidates.sum().view(1, 1)
    limit = (n.double() * (config.budget * config.block_n)).floor().int()
    levels = budget_levels(
        defects,
        torch.arange(n_k, device=defects.device) < candidates[:, None],
        _forced_blocks(rows, n_k, kv_len, config),
        limit,
        block_n=config.block_n,
        levels=config.budget_levels,
        rest_keys=int(config.is_rest_mean),
    )
    return _fill_empty_rows(levels, _rank(defects[..., 3], candidates)[0])


def _refuse_negative(scores: Tensor) -> None:
    if scores.device.type == "cpu" and (scores < 0).any():
        raise ValueError(f"scores must be at least 0, got {scores.nan_to_num(nan=0.0).min()}")


def _fill_empty_rows(levels: Tensor, ranked: Tensor) -> Tensor:
    """Level 1 on the block of rank 0 of every row that has no level at all."""
    empty = (levels == 0).all(-1, keepdim=True)
    ids = torch.arange(levels.shape[-1], device=levels.device)
    return torch.where(empty & (ids == ranked[..., :1]), 1, levels).int().contiguous()


class _Rows:
    """Positions of the query blocks, in tokens; among the keys when causal."""

    def __init__(self, n_q: int, q_len: int, kv_len: int, config: PSAConfig, device) -> None:
        offset = kv_len - q_len if config.causal else 0
        begin = torch.arange(n_q, device=device) * config.block_m
        self.config = config
        self.end = q_len + offset
        self.first = begin + offset
        self.last = (begin + config.block_m).clamp(max=q_len) - 1 + offset

    def candidates(self, n_k: int) -> Tensor:
        """N, the leading key blocks that hold a key the query block can see, int64 `[Nq]`."""
        if not self.config.causal:
            return torch.full_like(self.first, n_k)
        return (self.last // self.config.block_n + 1).clamp(0, n_k)

    def straddling_blocks(self, n_k: int, kv_len: int) -> Tensor:
        """Blocks of which some row sees some but not all keys, bool `[Nq, Nk]`."""
        first, last = self.first[:, None], self.last[:, None]
        begin = torch.arange(n_k, device=first.device) * self.config.block_n
        final = (begin + self.config.block_n).clamp(max=kv_len) - 1
        return torch.maximum(first, begin) <= torch.minimum(last, final - 1)


def _forced_blocks(rows: _Rows, n_k: int, kv_len: int, config: PSAConfig) -> Tensor:
    """Blocks that text, sinks and the diagonal put at level 1 if they are seen, `[Nq, Nk]`."""
    forced = _text_blocks(rows, n_k, kv_len, config)
    forced = forced | (torch.arange(n_k, device=forced.device) < config.sink_blocks)
    return forced | rows.straddling_blocks(n_k, kv_len) if config.causal else forced


def _text_blocks(rows: _Rows, n_k: int, kv_len: int, config: PSAConfig) -> Tensor:
    """Blocks of which the query side or the key side holds a text token, bool `[Nq, Nk]`."""
    length = config.text_length
    key_begin = torch.arange(n_k, device=rows.first.device) * config.block_n
    if config.text_position == "start":
        queries, keys = rows.first < length, key_begin < length
    else:
        key_last = (key_begin + config.block_n).clamp(max=kv_len) - 1
        queries, keys = rows.last >= rows.end - length, key_last >= kv_len - length
    return (queries[:, None] | keys) & (length > 0)


def _rank(scores: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Block ids by descending score, ties to the lower id, and the bits of their scores.

    Non-negative floats are ordered as their bit patterns are. Candidates with a NaN score come
    after the scored ones (-1), then blocks that the row cannot see (-2).
    """
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 turns -0 into 0
    bits = bits.masked_fill(scores.isnan(), -1)
    seen = torch.arange(scores.shape[-1], device=scores.device) < candidates[:, None]
    bits = bits.masked_fill(~seen, -2)
    ranked_bits, ranked = bits.sort(dim=-1, stable=True, descending=True)
    return ranked, ranked_bits


def _topk_ends(candidates: Tensor, config: PSAConfig) -> list[tuple[int, Tensor]]:
    """(level, end rank `[Nq]`) in the order taken; shares of the number of candidates."""
    last, ends = torch.zeros_like(candidates), []
    for level, share in config.ratio_ends:
        merge = config.merge(level)
        end = torch.minimum(candidates, (candidates.double() * share).long())
        if merge > 1:
            whole = _whole_tiles(end - last, last, candidates, merge)
            end = torch.where(end > last, whole, end)
        last = torch.maximum(end, last)
        ends.append((level, last))
    return ends


def _thresholdbound_ends(
    ranked_bits: Tensor, candidates: Tensor, config: PSAConfig
) -> list[tuple[int, Tensor]]:
    """(level, end rank `[B, H, Nq]`) in the order taken; shares of the cumulative score."""
    n_k = ranked_bits.shape[-1]
    cumulative = _integer_scores(ranked_bits, 30 - math.ceil(math.log2(n_k))).cumsum(-1)
    total = cumulative[..., -1].float()
    scored = torch.arange(n_k, device=ranked_bits.device) < candidates[:, None]
    last, ends = torch.zeros_like(total, dtype=torch.int64), []
    for level, share in config.ratio_ends:
        merge = config.merge(level)
        bound = (total * torch.tensor(share + 1e-6, dtype=torch.float32).item()).floor().long()
        inside = ((cumulative <= bound[..., None]) & scored).sum(-1)
        first_end = torch.where(inside > 0, inside + 1, last)
        if merge > 1:
            end = _whole_tiles((first_end - last).clamp(min=0), last, candidates, merge)
        else:
            end = torch.maximum(torch.minimum(first_end, candidates), last)
            if level == 1:
                least = (candidates.double() * config.min_full_ratio).long() + 1
                end = torch.maximum(end, torch.minimum(candidates, least))
        last = torch.maximum(end, last)
        ends.append((level, last))
    return ends


def _integer_scores(ranked_bits: Tensor, shift: int) -> Tensor:
    """floor(score * 2^(shift - x)), `2^x` the least power of two at or above the row's largest.

    From the bits of float32 alone: score = mantissa * 2^(exponent - 150), so u is the mantissa
    shifted by `exponent - 150 + shift - x`.
    """
    bits = ranked_bits.long().clamp(min=0)  # NaN and invisible blocks count nothing
    stored = bits >> 23
    mantissa = (bits & 0x7FFFFF) | ((stored > 0).long() << 23)
    exponent = stored.clamp(min=1)
    top_mantissa, top_exponent = mantissa[..., :1], exponent[..., :1]
    # Bits of (top mantissa - 1): the least n with 2^n >= top mantissa.
    _, width = torch.frexp((top_mantissa - 1).clamp(min=0).double())
    shifts = exponent - (top_exponent + width) + shift
    return torch.where(
        shifts >= 0, mantissa << shifts.clamp(0, 31), mantissa >> (-shifts).clamp(0, 63)
    )


def _whole_tiles(count: Tensor, last: Tensor, n: Tensor, merge: int) -> Tensor:
    """End rank when `count` blocks from `last` are rounded to whole tiles of `merge` blocks.

    Up, unless that would pass the last candidate: then down, so that no tile is left part full.
    """
    end = torch.minimum(last + (count + merge - 1) // merge * merge, n)
    return torch.where(end == n, last + (n - last) // merge * merge, end)
