"""What `torch.utils.flop_counter` counts for the attention operators."""

from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from psa_torch.attention.ops import attention_backward, attention_forward, attention_tangent
from shared_specs.flops import attention_flops


def _products(
    with_keys: int, with_values: int, sizes: tuple, levels: Tensor, block_m: int, block_n: int
) -> int:
    """So many products of the size of q.k, and of the size of weights and values; `sizes` are the
    shapes of q, k and v."""
    (batch, heads, q_len, head_dim), (_, _, kv_len, _), (*_, value_dim) = sizes
    widths = {"head_dim": with_keys * head_dim, "value_dim": with_values * value_dim}
    if levels.device.type == "meta" or type(levels) is not Tensor:
        # Nobody knows the levels of a tensor without data: at most every block is whole.
        return 2 * batch * heads * q_len * kv_len * sum(widths.values())
    levels = levels.detach().cpu().numpy()
    return attention_flops(levels, q_len, kv_len, block_m=block_m, block_n=block_n, **widths)


@register_flop_formula(attention_forward._opoverload.overloadpacket, get_raw=True)
def forward_flops(q, k, v, levels, implementation, block_m, block_n, *_, **__) -> int:
    """The two products of the forward pass; reading the levels waits for the device."""
    return _products(1, 1, (q.shape, k.shape, v.shape), levels, block_m, block_n)


@register_flop_formula(attention_backward._opoverload.overloadpacket, get_raw=True)
def backward_flops(
    dout, dlse, q, k, v, levels, out, lse, implementation, block_m, block_n, *_, **__
) -> int:
    """Five products, where the forward pass has two: two of them with values."""
    return _products(3, 2, (q.shape, k.shape, v.shape), levels, block_m, block_n)


@register_flop_formula(attention_tangent._opoverload.overloadpacket, get_raw=True)
def tangent_flops(
    tq, tk, tv, q, k, v, levels, out, lse, implementation, block_m, block_n, *_, **__
) -> int:
    """Five products: three of queries and keys, two with values."""
    return _products(3, 2, (q.shape, k.shape, v.shape), levels, block_m, block_n)
