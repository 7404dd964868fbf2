"""Pooled keys and values (specification, section 2); the layout is `shared_specs.geometry`'s."""

from typing import NamedTuple

import torch
from torch import Tensor

from psa_torch._dispatch import repeated, use_kernels
from psa_torch._eager import is_eager, wants_gradient
from psa_torch._transforms import is_transformed
from psa_torch._vmap import register_batch_rule
from shared_specs.constants import LEVELS
from shared_specs.geometry import cdiv, level_start, padded_length, pyramid_rows


class Pyramid(NamedTuple):
    """Keys and values at every level, `[B, Hk, P, D]` each, `P = pyramid_rows(Lk, block_n)`."""

    k: Tensor
    v: Tensor


def build_pyramid(k: Tensor, v: Tensor, block_n: int) -> Pyramid:
    """Keys and values pooled by 1, 2, 4 and 8, finest first, end to end.

    Args:
        k, v: `[B, Hk, Lk, D]`.
        block_n: keys per block.

    Returns:
        Pyramid of `[B, Hk, P, D]` in the input dtype. A row is one mean over the real keys it
        covers, accumulated in float32 (float64 stays float64); rows that cover none are zero.
        Differentiable: the gradient of a key is the sum over the rows that cover it of the
        row's gradient divided by the row's count.
    """
    if is_transformed():
        return Pyramid(_pool_traced(k, block_n), _pool_traced(v, block_n))
    if is_eager(k, v) and not wants_gradient(k, v):
        return Pyramid(*_build_pyramid._init_fn(k, v, block_n))
    return Pyramid(*_build_pyramid(k, v, block_n))


def pool_levels(k: Tensor, v: Tensor, block_n: int) -> Pyramid:
    """The pyramid without its level 1: `[B, Hk, P - padded_length(Lk, block_n), D]` each.

    For kernels that read level 1 from the keys and values themselves; not differentiable.
    """
    if use_kernels(k):
        from psa_torch.kernels import pyramid

        return Pyramid(*pyramid.build_pyramid(k, v, block_n, with_level_1=False))
    padded = padded_length(k.shape[2], block_n)
    return Pyramid(*(_pool(x, block_n)[:, :, padded:].contiguous() for x in (k, v)))


@torch.library.custom_op("psa::build_pyramid", mutates_args=())
@repeated
def _build_pyramid(k: Tensor, v: Tensor, block_n: int) -> tuple[Tensor, Tensor]:
    if use_kernels(k):
        from psa_torch.kernels import pyramid

        return pyramid.build_pyramid(k, v, block_n)
    return _pool(k, block_n), _pool(v, block_n)


@_build_pyramid.register_fake
def _(k, v, block_n):
    def rows(x):
        b, h, length, d = x.shape
        return x.new_empty(b, h, pyramid_rows(length, block_n), d)

    return rows(k), rows(v)


def _setup_context(ctx, inputs, output):
    k, _, ctx.block_n = inputs
    ctx.kv_len = k.shape[2]


def _backward(ctx, dk, dv):
    return unpool(dk, ctx.kv_len, ctx.block_n), unpool(dv, ctx.kv_len, ctx.block_n), None


_build_pyramid.register_autograd(_backward, setup_context=_setup_context)
register_batch_rule(_build_pyramid)


def accumulator(x: Tensor) -> torch.dtype:
    """dtype of sums over tokens: float64 for float64, float32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _counts(length: int, groups: int, size: int, dtype: torch.dtype, device) -> Tensor:
    """Real tokens in each of `groups` groups of `size`, at least 1 so that it can divide."""
    starts = torch.arange(groups, device=device) * size
    return (length - starts).clamp(1, size).to(dtype)


def group_means(x: Tensor, size: int, groups: int | None = None) -> Tensor:
    """Means over groups of `size` adjacent tokens of `[..., L, D]`, real tokens only.

    Args:
        x: `[..., L, D]`.
        size: tokens per group.
        groups: groups to return; None means `ceil(L / size)`. Further ones are zero.

    Returns:
        `[..., groups, D]`, float32 (float64 for float64).
    """
    length, dtype = x.shape[-2], accumulator(x)
    if groups is None:
        groups = cdiv(length, size)
    x = x.to(dtype)
    if groups * size > length:
        x = torch.nn.functional.pad(x, (0, 0, 0, groups * size - length))
    sums = x.unflatten(-2, (groups, size)).sum(-2)
    return sums / _counts(length, groups, size, dtype, x.device)[:, None]


def _pool(x: Tensor, block_n: int) -> Tensor:
    *lead, length, d = x.shape
    padded, dtype = padded_length(length, block_n), accumulator(x)
    rows = x.new_empty(*lead, pyramid_rows(length, block_n), d, dtype=dtype)
    rows[..., :length, :] = x
    rows[..., length:padded, :] = 0
    # Every level's sums are pair sums of the level before; they become means in place at the end.
    below, pooled = rows[..., :padded, :], []
    for level in LEVELS[1:]:
        start, groups = level_start(length, block_n, level), padded // level
        sums = rows[..., start : start + groups, :]
        torch.add(below[..., ::2, :], below[..., 1::2, :], out=sums)
        pooled.append((sums, _counts(length, groups, level, dtype, x.device)))
        below = sums
    for sums, counts in pooled:
        sums /= counts[:, None]
    return rows.to(x.dtype)


def _pool_traced(x: Tensor, block_n: int) -> Tensor:
    """`_pool` with the same additions, none of them in place: it has every derivative."""
    length, dtype = x.shape[-2], accumulator(x)
    padded = padded_length(length, block_n)
    sums = torch.nn.functional.pad(x.to(dtype), (0, 0, 0, padded - length))
    rows = [sums]
    for level in LEVELS[1:]:
        sums = sums[..., ::2, :] + sums[..., 1::2, :]
        rows.append(sums / _counts(length, padded // level, level, dtype, x.device)[:, None])
    return torch.cat(rows, -2).to(x.dtype)


def unpool(rows: Tensor, kv_len: int, block_n: int) -> Tensor:
    """The transpose of pooling: gradients of pyramid rows to gradients of keys.

    Args:
        rows: `[B, Hk, P, D]`.
        kv_len, block_n: keys, and keys per block.

    Returns:
        `[B, Hk, Lk, D]` in the dtype of `rows`, summed in float32 (float64 for float64).
    """
    padded, dtype = padded_length(kv_len, block_n), accumulator(rows)
    total = rows[..., :kv_len, :].to(dtype)
    for level in LEVELS[1:]:
        start, groups = level_start(kv_len, block_n, level), padded // level
        share = rows[..., start : start + groups, :].to(dtype)
        share = share / _counts(kv_len, groups, level, dtype, rows.device)[:, None]
        total = total + share.repeat_interleave(level, -2)[..., :kv_len, :]
    return total.to(rows.dtype)
