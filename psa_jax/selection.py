"""From scores to levels (specification, section 6). Every step is integer or exact.

Shares of the number of blocks are products in float64; lengths are static, so they are taken on
the host and 64-bit mode is never needed.
"""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from psa_jax._arrays import describe, is_known
from psa_jax._switches import numpy_rules
from psa_jax.budget import budget_levels
from psa_jax.masks import put_along_last
from shared_specs.budget import cost_limits
from shared_specs.config import PSAConfig
from shared_specs.selection import candidate_blocks, check_scores, text_blocks, topk_ends

NAN_BITS = 0x7F800000
"""Bit patterns above that of infinity are NaN."""

AFTER_SCORED, AFTER_NAN = 1, 2
"""Sort keys that stand behind every score's: a NaN score, a block that the row cannot see."""


@numpy_rules
def select_levels(
    scores: Array,
    config: PSAConfig,
    *,
    q_len: int,
    kv_len: int,
    cap: Array | None = None,
) -> Array:
    """Levels of every (query block, key block) pair, on the device.

    Args:
        scores: float32 `[B, H, Nq, Nk]`, at least 0. NaN ranks last. In the mode 'budget' defects,
            `[B, H, Nq, Nk, 4]`, which are finite or NaN.
        config: ratios or budget, mode, and the text, sink and causal rules.
        q_len, kv_len: tokens; `Nq = ceil(q_len / block_m)`, `Nk = ceil(kv_len / block_n)`.
        cap: int32 `[B, Hk, Nk]` from `similarity.similarity_cap`, `H % Hk == 0`, or None;
            None in the mode 'budget'.

    Returns:
        int32 `[B, H, Nq, Nk]`, values in {0, 1, 2, 4, 8}, at least one above 0 in every row.
        No gradient flows from it to the scores.

    Raises:
        TypeError: scores are not float32, or the cap does not hold integers.
        ValueError: shapes do not fit the lengths, scores are known to be negative or defects to be
            infinite, or a budget has costs that do not fit int32 or a cap.
    """
    _check(scores, config, q_len, kv_len, cap)
    scores = lax.stop_gradient(scores)
    candidates = candidate_blocks(q_len, kv_len, config)
    if config.mask_mode == "budget":
        return _budget_levels(scores, candidates, config, q_len, kv_len)
    ranked, ranked_bits = _rank(scores, candidates)
    if config.mask_mode == "topk":
        ends = _topk_ends(candidates, scores.shape[-1], config)
    else:
        ends = _thresholdbound_ends(ranked_bits, candidates, config)
    rank = jnp.arange(scores.shape[-1], dtype=jnp.int32)
    by_rank = jnp.int32(0)
    # From the last range to the first, each overwriting the start of the one after it.
    for level, end in reversed(ends):
        by_rank = jnp.where(rank < end[..., None], jnp.int32(level), by_rank)
    by_rank = jnp.broadcast_to(by_rank, scores.shape)
    levels = put_along_last(jnp.zeros(scores.shape, jnp.int32), ranked, by_rank)
    if cap is not None:
        per_head = jnp.repeat(cap.astype(jnp.int32), scores.shape[1] // cap.shape[1], axis=1)
        levels = jnp.minimum(levels, per_head[:, :, None])
    levels = jnp.where(_forced_blocks(config, q_len, kv_len), 1, levels)
    levels = jnp.where(rank < candidates.astype(np.int32)[:, None], levels, 0)
    return _fill_empty_rows(levels, ranked[..., :1])


def _budget_levels(
    defects: Array, candidates: np.ndarray, config: PSAConfig, q_len: int, kv_len: int
) -> Array:
    n_k, per_row = defects.shape[3], config.budget_scope == "row"
    limit = cost_limits(candidates, n_k, config.block_n, config.budget, per_row=per_row)
    levels = budget_levels(
        defects,
        jnp.arange(n_k, dtype=jnp.int32) < candidates.astype(np.int32)[:, None],
        _forced_blocks(config, q_len, kv_len),
        jnp.asarray(limit, jnp.int32),
        block_n=config.block_n,
        levels=config.budget_levels,
        rest_keys=int(config.is_rest_mean),
    )
    ranked, _ = _rank(defects[..., 3], candidates)
    return _fill_empty_rows(levels, ranked[..., :1])


def _check(scores, config: PSAConfig, q_len: int, kv_len: int, cap) -> None:
    described = None if cap is None else describe("cap", cap)
    check_scores(describe("scores", scores), described, config, q_len, kv_len)
    if is_known(scores) and (np.asarray(scores) < 0).any():
        raise ValueError(f"scores must be at least 0, got {np.nanmin(np.asarray(scores))}")
    if config.mask_mode == "budget" and is_known(scores) and np.isinf(np.asarray(scores)).any():
        raise ValueError("scores must be finite or NaN with mask_mode='budget', got inf")


def _rank(scores: Array, candidates: np.ndarray) -> tuple[Array, Array]:
    """Block ids by descending score, ties to the lower id, and the bits of their scores.

    Non-negative floats are ordered as their bit patterns are, and integers are never flushed to
    zero. Candidates with a NaN score come after the scored ones, then blocks that the row cannot
    see; the bits of both are 0.
    """
    bits = lax.bitcast_convert_type(scores, jnp.int32) & 0x7FFFFFFF  # -0 is 0
    key = jnp.where(bits > NAN_BITS, AFTER_SCORED, -bits)
    ids = lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    key = jnp.where(ids < candidates[:, None], key, AFTER_NAN).astype(jnp.int32)
    # No two pairs are equal, and a stable sort would carry an index along.
    ranked_key, ranked = lax.sort((key, ids), num_keys=2, is_stable=False)
    return ranked, jnp.maximum(-ranked_key, 0)


def _topk_ends(candidates: np.ndarray, n_k: int, config: PSAConfig) -> list[tuple[int, np.ndarray]]:
    """(level, end rank `[Nq]`) in the order taken; a function of the lengths alone."""
    per_row = [topk_ends(None, int(n), n_k, config) for n in candidates]
    return [
        (level, np.array([ends[place][1] for ends in per_row], np.int32))
        for place, (level, _) in enumerate(config.ratio_ends)
    ]


def _thresholdbound_ends(
    ranked_bits: Array, candidates: np.ndarray, config: PSAConfig
) -> list[tuple[int, Array]]:
    """(level, end rank `[B, H, Nq]`) in the order taken; shares of the cumulative score."""
    n_k = ranked_bits.shape[-1]
    scored = np.arange(n_k) < candidates[:, None]
    least = np.minimum(candidates, [int(config.min_full_ratio * int(n)) + 1 for n in candidates])
    candidates, least = candidates.astype(np.int32), least.astype(np.int32)
    shift = 30 - math.ceil(math.log2(n_k))
    cumulative = jnp.cumsum(_integer_scores(ranked_bits, shift), axis=-1, dtype=jnp.int32)
    total = cumulative[..., -1].astype(jnp.float32)
    last, ends = jnp.zeros(total.shape, jnp.int32), []
    for level, share in config.ratio_ends:
        bound = jnp.floor(total * np.float32(share + 1e-6)).astype(jnp.int32)
        inside = ((cumulative <= bound[..., None]) & scored).sum(-1, dtype=jnp.int32)
        first_end = jnp.where(inside > 0, inside + 1, last)
        merge = config.merge(level)
        if merge > 1:
            end = _whole_tiles(jnp.maximum(first_end - last, 0), last, candidates, merge)
        else:
            end = jnp.maximum(jnp.minimum(first_end, candidates), last)
            if level == 1:
                end = jnp.maximum(end, least)
        last = jnp.maximum(end, last)
        ends.append((level, last))
    return ends


def _integer_scores(ranked_bits: Array, shift: int) -> Array:
    """floor(score * 2^(shift - x)), `2^x` the least power of two at or above the row's largest.

    From the bits of float32 alone: score = mantissa * 2^(exponent - 150), so the result is the
    mantissa shifted by `exponent - 150 + shift - x`, whatever the device does to denormals.
    """
    stored = ranked_bits >> 23
    mantissa = (ranked_bits & 0x7FFFFF) | jnp.where(stored > 0, 1 << 23, 0)
    exponent = jnp.maximum(stored, 1)
    top_mantissa, top_exponent = mantissa[..., :1], exponent[..., :1]
    # Bits of (top mantissa - 1): the least n with 2^n >= top mantissa.
    width = 32 - lax.clz(jnp.maximum(top_mantissa - 1, 0))
    shifts = exponent - (top_exponent + width) + shift
    return jnp.where(
        shifts >= 0,
        mantissa << jnp.clip(shifts, 0, 31),
        mantissa >> jnp.clip(-shifts, 0, 31),
    )


def _whole_tiles(count: Array, last: Array, n: np.ndarray, merge: int) -> Array:
    """End rank when `count` blocks from `last` are rounded to whole tiles of `merge` blocks.

    Up, unless that would pass the last candidate: then down, so that no tile is left part full.
    """
    end = jnp.minimum(last + (count + merge - 1) // merge * merge, n)
    return jnp.where(end == n, last + (n - last) // merge * merge, end)


def _forced_blocks(config: PSAConfig, q_len: int, kv_len: int) -> Array:
    """Blocks that text, sinks and the diagonal put at level 1 if they are seen, `[Nq, Nk]`."""
    text_q, text_k = text_blocks(q_len, kv_len, config)
    ids = np.arange(len(text_k), dtype=np.int32)
    forced = jnp.asarray(text_q)[:, None] | (text_k | (ids < config.sink_blocks))
    if not config.causal:
        return forced
    first = np.arange(len(text_q)) * config.block_m
    last = np.minimum(first + config.block_m, q_len) - 1 + kv_len - q_len
    first = first + kv_len - q_len
    first, last = (jnp.asarray(x, jnp.int32)[:, None] for x in (first, last))
    begin = ids * config.block_n
    final = np.minimum(begin + config.block_n, kv_len) - 1
    # Some row of the query block sees some but not all keys of the key block.
    return forced | (jnp.maximum(first, begin) <= jnp.minimum(last, final - 1))


def _fill_empty_rows(levels: Array, best: Array) -> Array:
    """Level 1 on the block of rank 0 of every row that has no level at all."""
    ids = np.arange(levels.shape[-1], dtype=np.int32)
    empty = (levels == 0).all(-1, keepdims=True)
    return jnp.where(empty & (ids == best), 1, levels).astype(jnp.int32)
