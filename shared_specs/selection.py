"""From scores to levels (specification, section 6). Every step is integer or exact."""

from __future__ import annotations

import math

import numpy as np

from shared_specs.budget import budget_levels, check_costs
from shared_specs.checks import INTEGER_DTYPES, Described
from shared_specs.config import PSAConfig
from shared_specs.config_types import CallConfig
from shared_specs.geometry import cdiv


def candidate_blocks(q_len: int, kv_len: int, config: PSAConfig) -> np.ndarray:
    """N of each row: how many leading key blocks hold a key the query block can see, `[Nq]`."""
    n_q, n_k = cdiv(q_len, config.block_m), cdiv(kv_len, config.block_n)
    if not config.causal:
        return np.full(n_q, n_k, np.int32)
    _, last = _row_positions(q_len, kv_len, config)
    return np.clip(last // config.block_n + 1, 0, n_k).astype(np.int32)


def select_levels(
    scores: np.ndarray,
    config: PSAConfig,
    *,
    q_len: int,
    kv_len: int,
    cap: np.ndarray | None = None,
) -> np.ndarray:
    """Levels of every (query block, key block) pair.

    Args:
        scores: float32 `[B, H, Nq, Nk]`, at least 0. NaN ranks last. In the mode 'budget' defects,
            `[B, H, Nq, Nk, 4]`, which are finite or NaN.
        config: ratios or budget, mode, and the text, sink and causal rules.
        q_len, kv_len: tokens; `Nq = ceil(q_len / block_m)`, `Nk = ceil(kv_len / block_n)`.
        cap: int32 `[B, Hk, Nk]` from `similarity.similarity_cap`, `H % Hk == 0`, or None;
            None in the mode 'budget'.

    Returns:
        int32 `[B, H, Nq, Nk]`, values in {0, 1, 2, 4, 8}, at least one above 0 in every row.

    Raises:
        TypeError: the cap does not hold integers.
        ValueError: shapes do not fit the lengths, scores are negative, or a budget has costs that
            do not fit int32 or a cap.
    """
    scores = np.asarray(scores, np.float32)
    described = None if cap is None else Described(cap.shape, str(cap.dtype))
    check_scores(Described(scores.shape, "float32"), described, config, q_len, kv_len)
    n_k = scores.shape[3]
    if (scores < 0).any():
        raise ValueError(f"scores must be at least 0, got {np.nanmin(scores)}")
    candidates = candidate_blocks(q_len, kv_len, config)
    if config.mask_mode == "budget":
        levels = budget_levels(
            scores,
            np.arange(n_k) < candidates[:, None],
            forced_blocks(q_len, kv_len, config),
            block_n=config.block_n,
            budget=config.budget,
            levels=config.budget_levels,
            rest_keys=int(config.is_rest_mean),
            per_row=config.budget_scope == "row",
        )
        return _fill_empty_rows(levels, rank_blocks(scores[..., 3], candidates))
    ends_of = {"topk": topk_ends, "thresholdbound": thresholdbound_ends}[config.mask_mode]
    ranked = rank_blocks(scores, candidates)
    levels = np.zeros(scores.shape, np.int32)
    for row in np.ndindex(scores.shape[:3]):
        n = int(candidates[row[2]])
        ranked_scores = np.nan_to_num(scores[row][ranked[row]][:n], nan=0.0)
        last = 0
        for level, end in ends_of(ranked_scores, n, n_k, config):
            levels[row][ranked[row][last:end]] = level
            last = end
    if cap is not None:
        per_head = np.repeat(cap, scores.shape[1] // cap.shape[1], axis=1)
        levels = np.minimum(levels, per_head[:, :, None, :])
    return _fixed_rules(levels, ranked, config, q_len, kv_len)


def check_scores(
    scores: Described, cap: Described | None, config: CallConfig, q_len: int, kv_len: int
) -> None:
    """Refuse scores, or a cap, that selection does not take, before any work.

    Raises:
        TypeError: scores are not float32, or the cap does not hold integers.
        ValueError: a shape does not fit the lengths or the mode, or a budget has a cap or costs
            that do not fit int32.
    """
    n_q, n_k = cdiv(q_len, config.block_m), cdiv(kv_len, config.block_n)
    is_budget = config.mask_mode == "budget"
    expected = (n_q, n_k, 4) if is_budget else (n_q, n_k)
    if len(scores.shape) != 2 + len(expected) or tuple(scores.shape[2:]) != expected:
        raise ValueError(
            f"scores must be [B, H, {', '.join(map(str, expected))}] for q_len={q_len}, "
            f"kv_len={kv_len}, mask_mode={config.mask_mode!r}, got {tuple(scores.shape)}"
        )
    if scores.dtype != "float32":
        raise TypeError(f"scores must be float32, got {scores.dtype}")
    if is_budget:
        check_costs(n_q, n_k, config.block_n)
    if cap is None:
        return
    if is_budget:
        raise ValueError("cap must be None with mask_mode='budget', got one")
    if cap.dtype not in INTEGER_DTYPES:
        raise TypeError(f"cap must hold integers, got {cap.dtype}")
    batch, heads = scores.shape[:2]
    kv_heads = cap.shape[1] if len(cap.shape) == 3 else 0
    if kv_heads < 1 or heads % kv_heads or tuple(cap.shape) != (batch, kv_heads, n_k):
        raise ValueError(
            f"cap must be [{batch}, Hk, {n_k}] with Hk a divisor of {heads}, got {tuple(cap.shape)}"
        )


def rank_blocks(scores: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Block ids of each row by descending score, ties to the lower id, `[B, H, Nq, Nk]`.

    After the scored candidates stand candidates with a NaN score, then the blocks that the row
    cannot see at all.
    """
    seen = np.arange(scores.shape[-1]) < candidates[:, None]
    key = np.where(np.isnan(scores), np.float32(-1), scores)
    key = np.where(seen, key, np.float32(-2))
    return np.argsort(-key, axis=-1, kind="stable")


def topk_ends(ranked_scores, n: int, n_k: int, config: PSAConfig) -> list[tuple[int, int]]:
    """(level, end rank) in the order taken; shares of the number of candidates."""
    last, ends = 0, []
    for level, share in config.ratio_ends:
        end = min(n, int(n * share))
        if config.merge(level) > 1 and end > last:
            end = _whole_tiles(end - last, last, n, config.merge(level))
        last = max(end, last)
        ends.append((level, last))
    return ends


def thresholdbound_ends(
    ranked_scores: np.ndarray, n: int, n_k: int, config: PSAConfig
) -> list[tuple[int, int]]:
    """(level, end rank) in the order taken; shares of the row's cumulative score.

    Scores become integers first, so that the sum does not depend on its order: with `2^x` the
    smallest power of two at or above the largest score, `u = floor(score * 2^(shift - x))` and
    `shift` such that the sum of a row fits int32.
    """
    shift = 30 - math.ceil(math.log2(n_k))
    largest = float(ranked_scores.max()) if n else 0.0
    mantissa, x = math.frexp(largest)
    if mantissa == 0.5:  # frexp gives [0.5, 1): an exact power of two is its own bound
        x -= 1
    u = np.floor(np.ldexp(ranked_scores.astype(np.float64), shift - x)).astype(np.int64)
    cumulative = np.cumsum(u)
    total = np.float32(cumulative[-1]) if n else np.float32(0)
    last, ends = 0, []
    for level, share in config.ratio_ends:
        bound = math.floor(np.float32(share + 1e-6) * total)
        inside = int(np.count_nonzero(cumulative <= bound))
        first_end = _past_bound(inside, last)
        if config.merge(level) > 1:
            end = _whole_tiles(max(first_end - last, 0), last, n, config.merge(level))
        else:
            end = max(min(first_end, n), last)
            if level == 1:
                end = max(end, min(n, int(config.min_full_ratio * n) + 1))
        last = max(end, last)
        ends.append((level, last))
    return ends


def _past_bound(inside: int, last: int) -> int:
    """End rank when `inside` ranks lie within the bound: the block that crosses it is included."""
    return inside + 1 if inside > 0 else last


def _whole_tiles(count: int, last: int, n: int, merge: int) -> int:
    """End rank when `count` blocks from `last` are rounded to whole tiles of `merge` blocks.

    Up, unless that would pass the last candidate: then down, so that no tile is left part full.
    """
    end = min(last + cdiv(count, merge) * merge, n)
    return last + (n - last) // merge * merge if end == n else end


def _fixed_rules(levels, ranked, config: PSAConfig, q_len: int, kv_len: int) -> np.ndarray:
    """Text, sinks, the causal diagonal and the rule that no row stays empty, in this order."""
    levels = np.where(forced_blocks(q_len, kv_len, config), 1, levels)
    seen = np.arange(levels.shape[-1]) < candidate_blocks(q_len, kv_len, config)[:, None]
    return _fill_empty_rows(np.where(seen, levels, 0).astype(np.int32), ranked)


def forced_blocks(q_len: int, kv_len: int, config: PSAConfig) -> np.ndarray:
    """Blocks that text, sinks and the diagonal put at level 1 if they are seen, bool `[Nq, Nk]`."""
    text_q, text_k = text_blocks(q_len, kv_len, config)
    begin = np.arange(len(text_k)) * config.block_n
    forced = text_q[:, None] | text_k | (np.arange(len(text_k)) < config.sink_blocks)
    if config.causal:
        first, last = _row_positions(q_len, kv_len, config)
        final = np.minimum(begin + config.block_n, kv_len) - 1
        # Some row of the query block sees some but not all keys of the key block.
        forced |= np.maximum(first[:, None], begin) <= np.minimum(last[:, None], final - 1)
    return forced


def _fill_empty_rows(levels: np.ndarray, ranked: np.ndarray) -> np.ndarray:
    """Level 1 on the best block of every row that has no level at all."""
    best = ranked[..., :1]
    empty = (levels == 0).all(-1, keepdims=True)
    kept = np.take_along_axis(levels, best, -1)
    np.put_along_axis(levels, best, np.where(empty, np.int32(1), kept), -1)
    return levels


def text_blocks(q_len: int, kv_len: int, config: PSAConfig) -> tuple[np.ndarray, np.ndarray]:
    """Which query blocks and key blocks hold a text token, bool `[Nq]` and `[Nk]`.

    Text is the first or last `text_length` tokens of the keys, and of the queries; under a
    causal mask queries count by their position among the keys.
    """
    offset = kv_len - q_len if config.causal else 0
    last_of_q = kv_len if config.causal else q_len
    q_at, k_at = np.arange(q_len) + offset, np.arange(kv_len)
    if config.text_position == "start":
        is_text_q, is_text_k = q_at < config.text_length, k_at < config.text_length
    else:
        is_text_q = q_at >= last_of_q - config.text_length
        is_text_k = k_at >= kv_len - config.text_length
    if config.text_length == 0:
        is_text_q, is_text_k = np.zeros(q_len, bool), np.zeros(kv_len, bool)
    return _any_in_block(is_text_q, config.block_m), _any_in_block(is_text_k, config.block_n)


def _any_in_block(flags: np.ndarray, block: int) -> np.ndarray:
    padded = np.zeros(cdiv(len(flags), block) * block, bool)
    padded[: len(flags)] = flags
    return np.any(padded.reshape(-1, block), -1)


def _row_positions(q_len: int, kv_len: int, config: PSAConfig) -> tuple[np.ndarray, np.ndarray]:
    """Key positions of the first and last query of each query block (causal)."""
    first = np.arange(cdiv(q_len, config.block_m)) * config.block_m
    last = np.minimum(first + config.block_m, q_len) - 1
    return first + kv_len - q_len, last + kv_len - q_len
