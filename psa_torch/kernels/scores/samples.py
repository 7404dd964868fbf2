"""What stands for the tokens of each block in `pooled` and `sampled` scores: means, or some tokens.

The warp-specialised kernel wants rows that count end to end, keys by their place in the block; the
other kernel picks them out of what is there.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from psa_torch.kernels._launch import next_power_of_2
from psa_torch.kernels.scores.means import pool_blocks
from shared_specs.sampling import SamplePlan


class Samples(NamedTuple):
    """What stands for the queries, or the keys, of each block.

    Attributes:
        values: `[B, heads, rows, D]`: means (rows are groups) or the tokens themselves. For the
            warp-specialised kernel the rows that count, contiguous: of queries block after block,
            of keys one of every block, then the next of every block.
        length: tokens of the sequence.
        block: tokens per block.
        size: tokens per row.
        scale: float32 `[B, heads, blocks]`, factor on the rows of a block, or None for 1.
        offsets: int32, the sampled rows of a block, or None for all.
        per_block: rows per block that count; of queries a power of two.
    """

    values: Tensor
    length: int
    block: int
    size: int
    scale: Tensor | None
    offsets: Tensor | None
    per_block: int


def mean_samples(x: Tensor, block: int, size: int, *, by_place: bool) -> Samples:
    """Means over groups of `size` tokens of `[B, heads, L, D]`, for either kernel."""
    rows, scale = pool_blocks(x, block, size, by_place=by_place)
    return Samples(rows, x.shape[2], block, size, scale, None, block // size)


def token_samples(x: Tensor, plan: SamplePlan) -> Samples:
    """Tokens of `[B, heads, L, D]` at the offsets of `plan`, which stay where they are."""
    offsets = _offsets(plan, x.device)
    return Samples(x, x.shape[2], plan.block, 1, None, offsets, offsets.shape[0])


def gathered_queries(samples: Samples, plan: SamplePlan) -> Samples:
    """`token_samples` of queries with the sampled rows end to end, block after block."""
    x = samples.values
    return samples._replace(values=x.index_select(2, _sampled(plan, samples.length, x.device)))


def gathered_keys(samples: Samples, plan: SamplePlan) -> Samples:
    """`token_samples` of keys with the first row of every block, then the second, ..."""
    x = samples.values
    at = _sampled(plan, samples.length, x.device, by_place=True)
    return samples._replace(values=x.index_select(2, at), per_block=plan.count)


def _repeat_last(plan: SamplePlan) -> Tensor:
    """Sampling offsets, the last one repeated up to a power of two: a repeat changes no maximum."""
    offsets = torch.tensor(plan.offsets.tolist(), dtype=torch.int32)
    missing = next_power_of_2(plan.count) - plan.count
    return torch.cat([offsets, offsets[-1:].expand(missing)])


@functools.lru_cache(maxsize=64)
def _offsets(plan: SamplePlan, device: torch.device) -> Tensor:
    """`_repeat_last` on the device. Kept per device: a copy is made once, not per call."""
    return _repeat_last(plan).to(device)


@functools.lru_cache(maxsize=64)
def _sampled(
    plan: SamplePlan, length: int, device: torch.device, *, by_place: bool = False
) -> Tensor:
    """Sampled tokens on the device: block after block, with as many as `_offsets` has, or the first
    of every block, then the second, ..."""
    starts = torch.arange(0, length, plan.block)
    if by_place:
        at = torch.tensor(plan.offsets.tolist())[:, None] + starts
    else:
        at = starts[:, None] + _repeat_last(plan)
    return at.clamp(max=length - 1).flatten().to(device)


@triton.jit
def place_in_block(offsets, sample):
    """Row inside its block of a sample."""
    if offsets is None:
        place = sample
    else:
        place = tl.load(offsets + sample)
    return place
