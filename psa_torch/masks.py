"""Serial forms of a level mask and its density (specification, sections 3 and 9).

Values are checked on CPU tensors. On a GPU a check would make the host wait for the device, so
there a block with a value outside the accepted set is skipped, and an id outside the mask is
ignored; move a mask to the CPU to have it checked.
"""

import torch
from torch import Tensor

from psa_torch._vmap import register_batch_rule
from shared_specs.constants import MASK_LEVELS
from shared_specs.masks import SEPARATOR


def to_segments(levels: Tensor, scores: Tensor | None = None) -> Tensor:
    """Dense levels to `new_mask_type`.

    Args:
        levels: integer `[..., Nq, Nk]`, values in {0, 1, 2, 4, 8}.
        scores: `[..., Nq, Nk]`; with them the ids of a segment stand by descending score (ties
            to the lower id, NaN last), without by ascending id.

    Returns:
        int32 `[..., Nq, Nk + 5]`: block ids of levels 1, 2, 4, 8, 0, each segment closed by -1.

    Raises:
        TypeError: `levels` is not an integer tensor.
        ValueError: `scores` has another shape, or (CPU) a level is outside the set.
    """
    _require_integers("levels", levels)
    if scores is None:
        return _to_segments(levels, None)
    if scores.shape != levels.shape:
        raise ValueError(
            f"scores must have the shape of levels {tuple(levels.shape)}, got {tuple(scores.shape)}"
        )
    return _to_segments(levels, scores.detach())


@torch.library.custom_op("psa::to_segments", mutates_args=())
def _to_segments(levels: Tensor, scores: Tensor | None) -> Tensor:
    check_level_values(levels)
    n = levels.shape[-1]
    segment = torch.full_like(levels, len(MASK_LEVELS) - 1, dtype=torch.int64)
    for place, level in enumerate(MASK_LEVELS[:-1]):
        segment.masked_fill_(levels == level, place)
    if scores is None:
        order = segment.argsort(dim=-1, stable=True)
    else:
        ranked = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        ranked = ranked.argsort(dim=-1, stable=True, descending=True)
        order = ranked.gather(-1, segment.gather(-1, ranked).argsort(dim=-1, stable=True))
    # A block's place is its rank plus the separators that stand before its segment.
    places = torch.arange(n, device=levels.device) + segment.gather(-1, order)
    segments = levels.new_full((*levels.shape[:-1], n + len(MASK_LEVELS)), SEPARATOR).int()
    return segments.scatter_(-1, places, order.int())


@_to_segments.register_fake
def _(levels, scores):
    return levels.new_empty(
        (*levels.shape[:-1], levels.shape[-1] + len(MASK_LEVELS)), dtype=torch.int32
    )


register_batch_rule(_to_segments)


def from_segments(segments: Tensor) -> Tensor:
    """`new_mask_type` to dense levels, int32 `[..., Nq, Nk]`.

    Raises:
        TypeError: `segments` is not an integer tensor.
        ValueError: the last axis is shorter than 6, or (CPU) a row does not hold five closed
            segments that name every block once.
    """
    _require_integers("segments", segments)
    if segments.ndim < 1 or segments.shape[-1] <= len(MASK_LEVELS):
        raise ValueError(
            f"segments must be [..., Nq, Nk + 5] with Nk >= 1, got {tuple(segments.shape)}"
        )
    return _from_segments(segments)


@torch.library.custom_op("psa::from_segments", mutates_args=())
def _from_segments(segments: Tensor) -> Tensor:
    _check_segments(segments)
    n = segments.shape[-1] - len(MASK_LEVELS)
    segment = (segments == SEPARATOR).cumsum(-1)
    value = torch.zeros_like(segment, dtype=torch.int32)
    for place, level in enumerate(MASK_LEVELS):
        value.masked_fill_(segment == place, level)
    # Separators and ids outside the mask go to a column of their own, cut off below.
    ids = segments.long()
    ids = torch.where((ids >= 0) & (ids < n), ids, n)
    levels = value.new_zeros((*segments.shape[:-1], n + 1))
    return levels.scatter_(-1, ids, value)[..., :n].contiguous()


@_from_segments.register_fake
def _(segments):
    return segments.new_empty(
        (*segments.shape[:-1], segments.shape[-1] - len(MASK_LEVELS)), dtype=torch.int32
    )


register_batch_rule(_from_segments)


def density(levels: Tensor, *, candidates: Tensor | None = None, rest_share: float = 0.0) -> float:
    """Mean of 1/level (`rest_share` at level 0) over the candidate blocks (section 9).

    Args:
        levels: integer `[..., Nq, Nk]`.
        candidates: integer `[Nq]`, the leading blocks of each row that can be seen at all (see
            `shared_specs.selection.candidate_blocks`); None means all of them.
        rest_share: of a block of level 0, `PSAConfig.rest_share`.

    Returns:
        A Python float; on a GPU reading it waits for the device.
    """
    _require_integers("levels", levels)
    check_level_values(levels)
    cost = torch.where(levels > 0, 1.0 / levels.clamp(min=1).double(), rest_share)
    if candidates is None:
        return float(cost.mean())
    candidates = torch.as_tensor(candidates, device=levels.device)
    seen = torch.arange(levels.shape[-1], device=levels.device) < candidates[:, None]
    total = float(seen.sum()) * levels.shape[:-2].numel()
    return float((cost * seen).sum()) / total if total else 0.0


def check_level_values(levels: Tensor) -> None:
    """Raise ValueError if a CPU tensor holds a value other than 0, 1, 2, 4, 8."""
    if levels.device.type != "cpu":
        return
    wrong = torch.ones_like(levels, dtype=torch.bool)
    for level in MASK_LEVELS:
        wrong &= levels != level
    if wrong.any():
        place = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"levels must be 0, 1, 2, 4 or 8, got {int(levels[tuple(place)])} at {place}"
        )


def _check_segments(segments: Tensor) -> None:
    if segments.device.type != "cpu":
        return
    width, n = segments.shape[-1], segments.shape[-1] - len(MASK_LEVELS)
    rows = segments.reshape(-1, width)
    closed = rows == SEPARATOR
    open_rows = (closed.sum(-1) != len(MASK_LEVELS)) | ~closed[:, -1]
    if open_rows.any():
        row = int(open_rows.nonzero()[0])
        raise ValueError(
            f"segments row {row} must be five segments each closed by -1, with the last -1 at "
            f"the end; found -1 at places {closed[row].nonzero()[:, 0].tolist()} of {width}"
        )
    ids = rows[~closed].view(-1, n)
    wrong = (ids.sort(-1).values != torch.arange(n)).any(-1)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"segments row {row} must name each block id 0..{n - 1} once, got {ids[row].tolist()}"
        )


def _require_integers(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.is_floating_point() or x.is_complex():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be an integer tensor, got {kind}")
