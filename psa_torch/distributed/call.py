"""`psa_attention` of a sequence that is spread over several ranks."""

from collections.abc import Sequence
from typing import Literal, Required, Unpack, overload

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from psa_torch._checks import checked_inputs, describe
from psa_torch._config import settings_of
from psa_torch._types import Overrides
from psa_torch.attention import IMPLEMENTATIONS, choose
from psa_torch.distributed.exchange import to_heads, to_sequence
from psa_torch.functional import psa_attention as attention_of_whole_sequences
from psa_torch.order import TokenOrder
from shared_specs import checks
from shared_specs.config import PSAConfig
from shared_specs.head_plan import head_plan


class CallArguments(Overrides, total=False):
    """Keywords of `psa_attention` that do not change the kind of result."""

    group: Required[dist.ProcessGroup | DeviceMesh]
    lengths: Sequence[int] | None
    config: PSAConfig | None
    levels: Tensor | None
    implementation: str | None


@overload
def psa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[False] = False,
    return_levels: Literal[False] = False,
    **arguments: Unpack[CallArguments],
) -> Tensor: ...
@overload
def psa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[True],
    return_levels: Literal[True],
    **arguments: Unpack[CallArguments],
) -> tuple[Tensor, Tensor, Tensor]: ...
@overload
def psa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[True],
    return_levels: Literal[False] = False,
    **arguments: Unpack[CallArguments],
) -> tuple[Tensor, Tensor]: ...
@overload
def psa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[False] = False,
    return_levels: Literal[True],
    **arguments: Unpack[CallArguments],
) -> tuple[Tensor, Tensor]: ...
@overload
def psa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: bool = False,
    return_levels: bool = False,
    **arguments: Unpack[CallArguments],
) -> Tensor | tuple[Tensor, ...]: ...
def psa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: dist.ProcessGroup | DeviceMesh,
    lengths: Sequence[int] | None = None,
    config: PSAConfig | None = None,
    levels: Tensor | None = None,
    return_lse: bool = False,
    return_levels: bool = False,
    implementation: str | None = None,
    **overrides: Unpack[Overrides],
) -> Tensor | tuple[Tensor, ...]:
    """`psa_torch.psa_attention` of q, k and v whose tokens are spread over the ranks of `group`.

    Every rank gets the whole sequence of some heads, computes those, and sends the output back
    (DeepSpeed-Ulysses, arXiv 2309.14509): levels are those of one device bit for bit, for every
    estimator, mode, token order and causal setting. Gradients are repeatable. All ranks must call
    it with the same arguments but for q, k, v and levels. Tokens that every rank holds a copy of
    (text in some models) would count once for every rank: spread them like the others.

    Args:
        q: `[B, H, L_r, D]`, this rank's tokens; ranks hold the sequence in their order.
        k, v: `[B, Hk, L_r, D]`.
        group: a process group or a one-dimensional `DeviceMesh`. In a group of one this is the
            plain call.
        lengths: tokens of every rank; None where all have as many as this one. They are host
            integers: nothing is exchanged to learn them, and a wrong entry of another rank shows
            as a hang or an error of the collective.
        config, implementation, **overrides: as in `psa_torch.psa_attention`; `grid` and
            `text_length` are those of the whole sequence.
        levels: of the rows that this rank computes, `[1, n, Nq, Nk]` or segments (see
            `shared_specs.head_plan.head_plan`); in a group of one as in the plain call.
        return_lse: also return the log of the sum of exponentials, `[B, H, L_r]`.
        return_levels: also return the levels of the rows that this rank computed.

    Returns:
        out `[B, H, L_r, D]`, then lse, then levels, each if asked for.

    Raises:
        TypeError, ValueError: before anything is sent: as `psa_torch.psa_attention`; `group` or
            `lengths` does not fit; or the ranks cannot share the heads evenly. What follows from
            one rank's own tensors is raised on that rank only.
    """
    group = _process_group(group)
    checks.check_flag("return_lse", return_lse)
    checks.check_flag("return_levels", return_levels)
    q, k, v = _local_inputs(q, k, v)
    (batch, heads, length, head_dim), kv_heads = q.shape, k.shape[1]
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    lengths = _checked_lengths(lengths, length, world, rank)
    plan = head_plan(batch, heads, kv_heads, world)
    settings = settings_of(config, overrides)
    TokenOrder.from_config(settings, sum(lengths), sum(lengths))  # grid and text make up the length
    checks.check_implementation(implementation, IMPLEMENTATIONS)
    if implementation is not None:
        choose(implementation, q, k, v, block_m=settings.block_m, block_n=settings.block_n)
    options = {
        "return_lse": return_lse,
        "config": config,
        "levels": levels,
        "return_levels": return_levels,
        "implementation": implementation,
        **overrides,
    }
    if world == 1:
        return attention_of_whole_sequences(q, k, v, **options)
    if levels is not None:
        whole = describe("q", q)._replace(shape=(1, len(plan.q_rows[rank]), sum(lengths), head_dim))
        blocks = {"block_m": settings.block_m, "block_n": settings.block_n}
        checks.check_levels_shape(describe("levels", levels), whole, whole, **blocks)
    found = attention_of_whole_sequences(
        to_heads(q, plan.q_rows, lengths, group),
        to_heads(k, plan.kv_rows, lengths, group),
        to_heads(v, plan.kv_rows, lengths, group),
        **options,
    )
    found = found if isinstance(found, tuple) else (found,)
    moved = found[: 1 + return_lse]
    results = [to_sequence(x, batch, plan.q_rows, lengths, group) for x in moved]
    results += found[len(moved) :]
    return results[0] if len(results) == 1 else tuple(results)


def _process_group(group: dist.ProcessGroup | DeviceMesh) -> dist.ProcessGroup:
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"group must be a mesh of one dimension, got {group.mesh_dim_names or group}; "
                "name one: mesh['ulysses']"
            )
        return group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "group must be a torch.distributed ProcessGroup or a one-dimensional DeviceMesh, got "
            f"{type(group).__name__}"
        )
    return group


def _local_inputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as autocast has them: what is sent is what attention multiplies."""
    from torch.distributed.tensor import DTensor

    for name, x in (("q", q), ("k", k), ("v", v)):
        if isinstance(x, DTensor):
            raise TypeError(
                f"{name} must be a plain tensor, got a DTensor; pass {name}.to_local(), which must "
                "be sharded along the sequence (dimension 2)"
            )
    (q, k, v), _ = checked_inputs(q, k, v)
    if q.shape[2] != k.shape[2]:
        raise ValueError(
            "q and k must hold the same tokens of the sequence, got "
            f"{q.shape[2]} queries and {k.shape[2]} keys on this rank"
        )
    return q, k, v


def _checked_lengths(
    lengths: Sequence[int] | None, length: int, world: int, rank: int
) -> tuple[int, ...]:
    if lengths is None:
        return (length,) * world
    if isinstance(lengths, Tensor) or not isinstance(lengths, Sequence):
        raise TypeError(
            f"lengths must be a sequence of Python integers, got {type(lengths).__name__}"
        )
    lengths = [checks.check_integer(f"lengths[{i}]", value) for i, value in enumerate(lengths)]
    if len(lengths) != world or min(lengths) < 1 or lengths[rank] != length:
        raise ValueError(
            f"lengths must have {world} entries of at least 1, that of rank {rank} being {length}, "
            f"got {tuple(lengths)}"
        )
    return tuple(lengths)
