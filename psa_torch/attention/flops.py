"""What `torch.utils.flop_counter` counts for the attention operators."""

from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from psa_torch.attention.ops import attention_backward, attention_forward, attention_tangent
from shared_specs.flops import attention_flops


def _forward(q: Tensor, k: Tensor, levels: Tensor, block_m: int, block_n: int) -> int:
    (_, _, q_len, head_dim), kv_len = q.shape, k.shape[2]
    if levels.device.type == "meta" or type(levels) is not Tensor:
        # Nobody knows the levels of a tensor without data: at most every block is whole.
        return 4 * q.shape[0] * q.shape[1] * q_len * kv_len * head_dim
    levels = levels.detach().cpu().numpy()
    return attention_flops(levels, q_len, kv_len, head_dim, block_m, block_n)


@register_flop_formula(attention_forward._opoverload.overloadpacket, get_raw=True)
def forward_flops(q, k, v, levels, implementation, block_m, block_n, *_, **__) -> int:
    """The two products of the forward pass; reading the levels waits for the device."""
    return _forward(q, k, levels, block_m, block_n)


@register_flop_formula(attention_backward._opoverload.overloadpacket, get_raw=True)
def backward_flops(
    dout, dlse, q, k, v, levels, out, lse, implementation, block_m, block_n, *_, **__
) -> int:
    """Five products, where the forward pass has two."""
    return _forward(q, k, levels, block_m, block_n) * 5 // 2


@register_flop_formula(attention_tangent._opoverload.overloadpacket, get_raw=True)
def tangent_flops(
    tq, tk, tv, q, k, v, levels, out, lse, implementation, block_m, block_n, *_, **__
) -> int:
    """Five products: three of queries and keys, two with values."""
    return _forward(q, k, levels, block_m, block_n) * 5 // 2
