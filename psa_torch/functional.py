"""Pyramid sparse attention as a function: from q, k and v to the output."""

from typing import Literal, Unpack, overload

import torch
from torch import Tensor

from psa_torch._checks import absorb_scale, checked_inputs, levels_form, require_tensor
from psa_torch._config import settings_of
from psa_torch._exported import chosen_attention
from psa_torch._types import CallArguments, Overrides
from psa_torch.attention import IMPLEMENTATIONS, attend, choose
from psa_torch.attention.sequences import check_lengths
from psa_torch.attention.whole import choose_and_attend
from psa_torch.choice import Chosen, choose_levels, levels_of_sequences, serial_levels
from psa_torch.masks import from_segments
from psa_torch.order import TokenOrder
from shared_specs import checks
from shared_specs.config import PSAConfig


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
    config: PSAConfig | None = None,
    levels: Tensor | None = None,
    return_lse: bool = False,
    return_levels: bool = False,
    implementation: str | None = None,
    q_lens: Tensor | None = None,
    kv_lens: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0,  # a float would be a symbol, and analysed twice, under dynamic shapes
    is_causal: bool = False,
    **overrides: Unpack[Overrides],
) -> Tensor | tuple[Tensor, ...]:
    """Pyramid sparse attention: choose a level for every block, attend over pooled keys.

    Differentiable in q, k and v for the levels chosen; the choice itself has no gradient. Inside
    `torch.autocast` it behaves as `scaled_dot_product_attention` does. On a GPU nothing between
    q, k, v and the output makes the host wait.

    Args:
        q: `[B, H, Lq, D]`; float16, bfloat16, float32 or float64; D a multiple of 8 up to 256.
        k, v: `[B, Hk, Lk, D]` and `[B, Hk, Lk, Dv]`, `H % Hk == 0`, Dv like D; head h reads
            key/value head `h // (H // Hk)`.
        config: a `PSAConfig`; None means the default one. With a `rearrange_method` the tokens
            are reordered for attention (k-means starts cold in every call) and the output, lse
            included, is put back.
        levels: levels to use instead of choosing them: integers `[B, H, Nq, Nk]` with values in
            {0, 1, 2, 4, 8}, or segments `[B, H, Nq, Nk + 5]`. They index blocks of the reordered
            sequence if the configuration reorders it, as the levels that this function returns do.
        return_lse: also return the log of the sum of exponentials, `[B, H, Lq]`, float32.
        return_levels: also return the levels, in the serial form that `config.attn_impl` names:
            segments for 'new_mask_type', dense for 'old_mask_type'.
        implementation: a key of `psa_torch.attention.IMPLEMENTATIONS`, or None for the best one.
        q_lens, kv_lens: tokens of each sequence, integers `[B]` on the device of q from 0 to Lq
            and Lk; None means all of them. Levels and results are those of each sequence alone:
            what lies past its end is not read, its out is 0, its lse -inf, its gradients 0 and its
            levels 0. The host waits for the lengths. There is no token order then, and no
            `cu_seqlens`: sequences packed end to end are not accepted.
        attn_mask, dropout_p, is_causal: what callers of `scaled_dot_product_attention` pass
            along; only None, 0 and False, which change nothing, are accepted.
        **overrides: fields of `PSAConfig` that replace those of `config`. `scale` may be a tensor,
            0-d or `[H]`: it is multiplied into q and gets a gradient.

    Returns:
        out `[B, H, Lq, Dv]` in the dtype of q (of autocast inside it), then lse, then levels,
        each if asked for.

    Raises:
        TypeError: an argument has a type or dtype that is not accepted, or is unknown.
        ValueError: a value, a shape or a combination is not accepted; the message says what is.
        NotImplementedError: lengths inside a `torch.func` transform.
    """
    _refuse_dense_arguments(attn_mask, dropout_p, is_causal)
    scale = overrides.get("scale")
    if isinstance(scale, Tensor):
        overrides["scale"] = 1.0
    settings = settings_of(config, overrides)
    checks.check_flag("return_lse", return_lse)
    checks.check_flag("return_levels", return_levels)
    checks.check_implementation(implementation, IMPLEMENTATIONS)
    inputs = checked_inputs(q, k, v)
    q, k, v = inputs.tensors
    q, _ = absorb_scale(q, scale)
    blocks = {"block_m": settings.block_m, "block_n": settings.block_n}
    if levels is not None:
        require_tensor("levels", levels)
        form = levels_form(levels, inputs, **blocks)
    if implementation is not None and not torch.compiler.is_compiling():
        choose(implementation, q, k, v, **blocks)  # refuses before any work
    lens = q_lens, kv_lens
    has_lens = check_lengths(q, *lens)
    if has_lens and settings.rearrange_method is not None:
        raise ValueError(
            "rearrange_method must be None where q_lens or kv_lens are given: a token order is of "
            f"whole sequences, got {settings.rearrange_method!r}"
        )
    order = TokenOrder.from_config(settings, q.shape[2], k.shape[2])
    q, k, v, state = order.apply(q, k, v)
    if levels is None and not has_lens:
        if torch.compiler.is_exporting() and not return_levels:
            out, lse = chosen_attention(q, k, v, settings.to_json(), implementation)
            chosen = None
        else:
            out, lse, listed, scores = choose_and_attend(
                choose_levels,
                q,
                k,
                v,
                settings,
                implementation,
                keep_lse=return_lse,
                keep_choice=return_levels,
            )
            chosen = None if listed is None else Chosen(listed, scores)
    else:
        if levels is None:
            chosen = Chosen(*levels_of_sequences(q, k, *lens, settings.to_json()))
        else:
            dense = from_segments(levels) if form == "segments" else levels.detach()
            chosen = Chosen(dense, None)
        out, lse = attend(
            q,
            k,
            v,
            chosen.levels,
            **blocks,
            scale=settings.scale,
            is_causal=settings.causal,
            rest=settings.rest,
            implementation=implementation,
            lens=lens,
            keep_lse=return_lse,
        )
    results = [order.undo(out, state)]
    if return_lse:
        results.append(order.undo(lse, state))
    if chosen is not None and return_levels:
        results.append(serial_levels(chosen, settings))
    return results[0] if len(results) == 1 else tuple(results)


def _refuse_dense_arguments(attn_mask, dropout_p, is_causal) -> None:
    """Arguments of dense attention that would change the result.

    Raises:
        TypeError, ValueError: one does, or is of another type.
    """
    if attn_mask is not None:
        raise ValueError(
            "attn_mask must be None: which keys are seen is chosen, or given as levels=, got "
            f"{type(attn_mask).__name__}"
        )
    if isinstance(dropout_p, Tensor) or dropout_p != 0:
        raise ValueError(f"dropout_p must be 0: there is no dropout, got {dropout_p!r}")
    checks.check_flag("is_causal", is_causal)
    if is_causal:
        raise ValueError(
            "is_causal must be False, got True: causal attention is the field causal of the "
            "configuration (causal=True)"
        )
