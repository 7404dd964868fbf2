"""What `torch.utils.flop_counter` counts for the attention operators."""

from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from psa_torch.attention.ops import attention_backward, attention_forward, attention_tangent
from psa_torch.attention.sequences import runs, sequences_backward, sequences_forward
from shared_specs.config import PSAConfig
from shared_specs.flops import attention_flops
from shared_specs.selection import candidate_blocks


@register_flop_formula(attention_forward._opoverload.overloadpacket, get_raw=True)
def forward_flops(q, k, v, levels, *settings, **_) -> int:
    """The two products of the forward pass; reading the levels waits for the device."""
    return _products(1, 1, (q.shape, k.shape, v.shape), levels, settings)


def _products(with_keys: int, with_values: int, shapes: tuple, levels: Tensor, settings) -> int:
    """So many products of the size of q.k, and of the size of weights and values.

    Args:
        shapes: of q, k and v.
        settings: what follows the levels in the arguments of `attention_forward`.
    """
    _, block_m, block_n, _, is_causal, rest, *_ = settings
    (batch, heads, q_len, head_dim), (_, _, kv_len, _), (*_, value_dim) = shapes
    widths = {"head_dim": with_keys * head_dim, "value_dim": with_values * value_dim}
    if levels.device.type == "meta" or type(levels) is not Tensor:
        # Nobody knows the levels of a tensor without data: at most every block is whole.
        return 2 * batch * heads * q_len * kv_len * sum(widths.values())
    masks = levels.detach().cpu().numpy()
    config = PSAConfig(block_m=block_m, block_n=block_n, tile_n=block_n, causal=is_causal)
    return attention_flops(
        masks,
        q_len,
        kv_len,
        block_m=block_m,
        block_n=block_n,
        rest=rest,
        candidates=candidate_blocks(q_len, kv_len, config),
        **widths,
    )


@register_flop_formula(attention_backward._opoverload.overloadpacket, get_raw=True)
def backward_flops(dout, dlse, q, k, v, levels, out, lse, *settings, **_) -> int:
    """Five products, where the forward pass has two: two of them with values."""
    return _products(3, 2, (q.shape, k.shape, v.shape), levels, settings)


@register_flop_formula(attention_tangent._opoverload.overloadpacket, get_raw=True)
def tangent_flops(tq, tk, tv, q, k, v, levels, out, lse, *settings, **_) -> int:
    """Five products: three of queries and keys, two with values."""
    return _products(3, 2, (q.shape, k.shape, v.shape), levels, settings)


@register_flop_formula(sequences_forward._opoverload.overloadpacket, get_raw=True)
def sequences_flops(q, k, v, levels, q_lens, kv_lens, *settings, **_) -> int:
    """`forward_flops` of each sequence; all of them whole where the levels are unknown."""
    return _of_sequences(1, 1, (q, k, v), levels, (q_lens, kv_lens), settings)


@register_flop_formula(sequences_backward._opoverload.overloadpacket, get_raw=True)
def sequences_backward_flops(
    dout, dlse, q, k, v, levels, q_lens, kv_lens, out, lse, *settings, **_
) -> int:
    """`backward_flops` of each sequence."""
    return _of_sequences(3, 2, (q, k, v), levels, (q_lens, kv_lens), settings)


def _of_sequences(with_keys: int, with_values: int, qkv: tuple, levels, lens, settings) -> int:
    if levels.device.type == "meta" or type(levels) is not Tensor:
        shapes = tuple(x.shape for x in qkv)
        return _products(with_keys, with_values, shapes, levels, settings)
    _, block_m, block_n, *_ = settings
    q, k, v = qkv
    return sum(
        _products(
            with_keys,
            with_values,
            (run.of_queries(q).shape, run.of_keys(k).shape, run.of_keys(v).shape),
            run.of_blocks(levels, block_m, block_n),
            settings,
        )
        for run in runs(q, k, *lens)
    )
