"""`scaled_dot_product_attention` with the signature of PyTorch's own."""

from __future__ import annotations

from torch import Tensor

from psa_torch._checks import require_tensor
from psa_torch._types import Overrides
from psa_torch.functional import psa_attention
from shared_specs import checks
from shared_specs.config import PSAConfig


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0,
    is_causal: bool = False,
    scale: float | Tensor | None = None,
    enable_gqa: bool = False,
    *,
    config: PSAConfig | None = None,
) -> Tensor:
    """`psa_attention` where `torch.nn.functional.scaled_dot_product_attention` is expected.

    Args:
        query: `[B, H, Lq, D]`, as q of `psa_attention`.
        key, value: `[B, Hk, Lk, D]` and `[B, Hk, Lk, Dv]`.
        attn_mask: None; a mask is refused.
        dropout_p: 0.
        is_causal: `causal` of the configuration; True only for as many queries as keys, for
            PyTorch aligns the first query with the first key, and `causal` the last with the last.
        scale: factor on q.k, a number or a tensor 0-d or `[H]`; None means that of `config`.
        enable_gqa: must be True where `H != Hk`, as in PyTorch.
        config: the configuration; None means the default one.

    Returns:
        `[B, H, Lq, Dv]` in the dtype of query.

    Raises:
        TypeError, ValueError: as `psa_attention`, or an argument asks for what is not there.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        require_tensor(name, x)
    checks.check_flag("is_causal", is_causal)
    checks.check_flag("enable_gqa", enable_gqa)
    overrides: Overrides = {} if scale is None else {"scale": scale}
    if query.ndim == key.ndim == 4:
        if not enable_gqa and query.shape[1] != key.shape[1]:
            raise ValueError(
                f"enable_gqa must be True where query and key differ in heads, got "
                f"{query.shape[1]} and {key.shape[1]}"
            )
        if is_causal and query.shape[2] != key.shape[2]:
            raise ValueError(
                f"is_causal=True needs as many queries as keys, got {query.shape[2]} and "
                f"{key.shape[2]}; psa_attention(..., causal=True) aligns the last query with the "
                "last key"
            )
    if is_causal:
        overrides["causal"] = True
    return psa_attention(
        query, key, value, config=config, attn_mask=attn_mask, dropout_p=dropout_p, **overrides
    )
