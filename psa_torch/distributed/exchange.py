"""From some tokens of all heads to all tokens of some heads, and back: one all-to-all each.

This is the exchange of DeepSpeed-Ulysses (arXiv 2309.14509). Both directions are differentiable,
and each is the other's gradient. The gradients only move: nothing is reduced, except what several
ranks owe one key/value head, which is added in the order of the ranks.
"""

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup


def to_heads(x: Tensor, rows: tuple[range, ...], lengths: tuple[int, ...], group: Group) -> Tensor:
    """All tokens of the rows of this rank.

    Args:
        x: `[B, Hx, L_r, ...]`, this rank's tokens of all heads.
        rows: rows of `x.flatten(0, 1)` that each rank gets (`HeadPlan.q_rows` or `.kv_rows`).
        lengths: tokens of each rank.
        group: the ranks.

    Returns:
        `[1, n, L, ...]`, n being the number of rows of this rank.
    """
    return _ToHeads.apply(x, rows, lengths, group)


def to_sequence(
    x: Tensor, batch: int, rows: tuple[range, ...], lengths: tuple[int, ...], group: Group
) -> Tensor:
    """This rank's tokens of all rows: the way back of `to_heads`, for rows that only one rank has.

    Args:
        x: `[1, n, L, ...]`.
        batch: B of what is returned.
        rows, lengths, group: as in `to_heads`; no row may be on two ranks.

    Returns:
        `[B, Hx, L_r, ...]`.
    """
    return _ToSequence.apply(x, batch, rows, lengths, group)


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rows, lengths, group):
        ctx.route, ctx.shape = (rows, lengths, group), x.shape
        return _send_tokens(x.flatten(0, 1), rows, lengths, group)

    @staticmethod
    def backward(ctx, dx):
        total = _send_rows(dx, *ctx.route)
        rows = ctx.route[0]
        sharing = sum(map(len, rows)) // rows[-1].stop
        if sharing > 1:
            total = _add_in_order(total.unflatten(0, (-1, sharing)))
        return total.view(ctx.shape), None, None, None


class _ToSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, batch, rows, lengths, group):
        ctx.route = rows, lengths, group
        got = _send_rows(x, rows, lengths, group)
        return got.view(batch, -1, *got.shape[1:])

    @staticmethod
    def backward(ctx, dx):
        return _send_tokens(dx.flatten(0, 1), *ctx.route), None, None, None, None


def _send_tokens(x: Tensor, rows, lengths, group) -> Tensor:
    """`[rows, L_r, ...]` to `[1, n, L, ...]`."""
    if _is_partition(rows):
        packed = x.contiguous()  # ranges one after the other: it is packed as it stands
    else:
        packed = torch.cat([x[part.start : part.stop] for part in rows])
    mine = len(rows[dist.get_rank(group)])
    token = x[0, 0].numel()
    got = _all_to_all(
        packed,
        [len(part) * x.shape[1] * token for part in rows],
        [mine * length * token for length in lengths],
        group,
    )
    pieces = got.split([mine * length * token for length in lengths])
    shaped = [
        piece.view(1, mine, length, *x.shape[2:])
        for piece, length in zip(pieces, lengths, strict=True)
    ]
    return torch.cat(shaped, 2)


def _send_rows(x: Tensor, rows, lengths, group) -> Tensor:
    """`[1, n, L, ...]` to `[rows, L_r, ...]`, in rank order where a row comes from several."""
    mine, token = lengths[dist.get_rank(group)], x[0, 0, 0].numel()
    packed = torch.cat([piece.reshape(-1) for piece in x.split(list(lengths), 2)])
    got = _all_to_all(
        packed,
        [x.shape[1] * length * token for length in lengths],
        [len(part) * mine * token for part in rows],
        group,
    )
    return got.view(-1, mine, *x.shape[3:])


def _all_to_all(packed: Tensor, sent: list[int], received: list[int], group) -> Tensor:
    """All sizes are known on the host, so that nothing has to wait for the device."""
    out = packed.new_empty(sum(received))
    dist.all_to_all_single(out, packed.view(-1), received, sent, group=group)
    return out


def _is_partition(rows) -> bool:
    return sum(map(len, rows)) == rows[-1].stop


def _add_in_order(parts: Tensor) -> Tensor:
    """`[rows, ranks, ...]` added over the ranks one by one, 16-bit ones in float32."""
    wide = parts if parts.dtype == torch.float64 else parts.float()
    total = wide[:, 0]
    for index in range(1, parts.shape[1]):
        total = total + wide[:, index]
    return total.to(parts.dtype)
