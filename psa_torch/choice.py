"""Which levels a call gets: scores, then selection; and their serial form."""

from typing import NamedTuple

import torch
from torch import Tensor

from psa_torch._config import parse_config
from psa_torch.attention.sequences import runs
from psa_torch.importance import block_scores
from psa_torch.masks import to_segments
from psa_torch.selection import select_levels
from psa_torch.similarity import similarity_cap
from shared_specs.budget import check_costs
from shared_specs.config import PSAConfig
from shared_specs.config_types import CallConfig
from shared_specs.geometry import cdiv


class Chosen(NamedTuple):
    """Levels and, where they were chosen here, the scores they were chosen by.

    Attributes:
        levels: int `[B, H, Nq, Nk]`.
        scores: float32 `[B, H, Nq, Nk]` (defects at rest where a budget chose) or None.
    """

    levels: Tensor
    scores: Tensor | None


def choose_levels(q: Tensor, k: Tensor, config: CallConfig) -> Chosen:
    """Scores and levels of q and k as they stand, in whatever order their tokens are.

    Every room detaches what it gets, so no gradient flows through the choice.
    """
    rows, columns = cdiv(q.shape[2], config.block_m), cdiv(k.shape[2], config.block_n)
    is_budget = config.mask_mode == "budget"
    if is_budget:
        check_costs(rows, columns, config.block_n)  # refuses before any work
    if not q.shape[0]:  # an empty batch: no room has to know
        scores = q.new_empty(0, q.shape[1], rows, columns, dtype=torch.float32)
        return Chosen(scores.int(), scores)
    scores = block_scores(q, k, config)
    cap = similarity_cap(k, config) if config.use_sim_mask else None
    levels = select_levels(scores, config, q_len=q.shape[2], kv_len=k.shape[2], cap=cap)
    return Chosen(levels, scores[..., 3] if is_budget else scores)


@torch.library.custom_op("psa::levels_of_sequences", mutates_args=())
def levels_of_sequences(
    q: Tensor, k: Tensor, q_lens: Tensor | None, kv_lens: Tensor | None, config: str
) -> tuple[Tensor, Tensor]:
    """`choose_levels` of each sequence; 0 in blocks past its end, which it does not read."""
    settings = parse_config(config)
    blocks = settings.block_m, settings.block_n
    levels, scores = _like_levels(q, k, settings)
    levels.zero_()
    scores.zero_()
    for run in runs(q, k, q_lens, kv_lens):
        found = choose_levels(run.of_queries(q), run.of_keys(k), settings)
        run.of_blocks(levels, *blocks).copy_(found.levels)
        if found.scores is not None:  # as those of chosen levels always are
            run.of_blocks(scores, *blocks).copy_(found.scores)
    return levels, scores


@levels_of_sequences.register_fake
def _(q, k, q_lens, kv_lens, config):
    return _like_levels(q, k, parse_config(config))


def _like_levels(q: Tensor, k: Tensor, config: PSAConfig) -> tuple[Tensor, Tensor]:
    rows, columns = cdiv(q.shape[2], config.block_m), cdiv(k.shape[2], config.block_n)
    scores = q.new_empty(*q.shape[:2], rows, columns, dtype=torch.float32)
    return torch.empty_like(scores, dtype=torch.int32), scores


def serial_levels(chosen: Chosen, config: CallConfig) -> Tensor:
    """Levels in the form that `config.attn_impl` names, int32."""
    if config.attn_impl == "old_mask_type":
        return chosen.levels.int()
    return to_segments(chosen.levels, chosen.scores)
