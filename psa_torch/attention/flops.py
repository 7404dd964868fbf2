"""What `torch.utils.flop_counter` counts for the attention operators."""

from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from psa_torch.attention.ops import attention_backward, attention_forward, attention_tangent
from shared_specs.config import PSAConfig
from shared_specs.flops import attention_flops
from shared_specs.selection import candidate_blocks


@register_flop_formula(attention_forward._opoverload.overloadpacket, get_raw=True)
def forward_flops(
    q, k, v, levels, implementation, block_m, block_n, scale, is_causal, rest, **_
) -> int:
    """The two products of the forward pass; reading the levels waits for the device."""
    (_, _, q_len, head_dim), kv_len = q.shape, k.shape[2]
    if levels.device.type == "meta" or type(levels) is not Tensor:
        # Nobody knows the levels of a tensor without data: at most every block is whole.
        return 4 * q.shape[0] * q.shape[1] * q_len * kv_len * head_dim
    levels = levels.detach().cpu().numpy()
    config = PSAConfig(block_m=block_m, block_n=block_n, tile_n=block_n, causal=is_causal)
    candidates = candidate_blocks(q_len, kv_len, config)
    sizes = q_len, kv_len, head_dim, block_m, block_n
    return attention_flops(levels, *sizes, rest=rest, candidates=candidates)


@register_flop_formula(attention_backward._opoverload.overloadpacket, get_raw=True)
def backward_flops(dout, dlse, q, k, v, levels, out, lse, *settings, **_) -> int:
    """Five products, where the forward pass has two."""
    return forward_flops(q, k, v, levels, *settings) * 5 // 2


@register_flop_formula(attention_tangent._opoverload.overloadpacket, get_raw=True)
def tangent_flops(tq, tk, tv, q, k, v, levels, out, lse, *settings, **_) -> int:
    """Five products: three of queries and keys, two with values."""
    return forward_flops(q, k, v, levels, *settings) * 5 // 2
