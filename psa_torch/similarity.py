"""How far each key block may be pooled (specification, section 7)."""

import torch
from torch import Tensor

from psa_torch._config import parse_config
from psa_torch._dispatch import repeated, use_kernels
from psa_torch._eager import eager
from psa_torch._vmap import register_batch_rule
from shared_specs.config_types import CallConfig
from shared_specs.geometry import cdiv

MIN_NORM_PRODUCT = 1e-12


def similarity_cap(k: Tensor, config: CallConfig) -> Tensor:
    """Largest level at which a key block's neighbours are still alike.

    Args:
        k: `[B, Hk, Lk, D]`.
        config: `block_n` and the three thresholds.

    Returns:
        int32 `[B, Hk, Nk]` in {1, 2, 4, 8}. Carries no gradient.
    """
    return _eager_similarity_cap(k.detach(), config.to_json())


@torch.library.custom_op("psa::similarity_cap", mutates_args=())
@repeated
def _similarity_cap(k: Tensor, config: str) -> Tensor:
    settings = parse_config(config)
    if use_kernels(k):
        from psa_torch.kernels import similarity

        return similarity.similarity_cap(k, settings)
    blocks = cdiv(k.shape[2], settings.block_n)
    cap = torch.ones(*k.shape[:2], blocks, dtype=torch.int32, device=k.device)
    for level, threshold in settings.similarity_thresholds.items():
        # The threshold as float32, which is what the similarity is.
        bound = torch.tensor(threshold, dtype=torch.float32).item()
        cap.masked_fill_(block_similarity(k, settings.block_n, level) > bound, level)
    return cap


@_similarity_cap.register_fake
def _(k, config):
    blocks = cdiv(k.shape[2], parse_config(config).block_n)
    return k.new_empty(k.shape[0], k.shape[1], blocks, dtype=torch.int32)


register_batch_rule(_similarity_cap)
_eager_similarity_cap = eager(_similarity_cap)


def block_similarity(k: Tensor, block_n: int, level: int) -> Tensor:
    """Mean cosine between the first and last key of each whole group of `level` keys.

    Returns:
        float32 `[B, Hk, Nk]`; -inf where a block has no whole group.
    """
    kv_len = k.shape[2]
    n_k, whole = cdiv(kv_len, block_n), kv_len // level
    groups = k[:, :, : whole * level].unflatten(2, (whole, level)).float()
    first, last = groups[..., 0, :], groups[..., -1, :]
    norms = first.norm(dim=-1) * last.norm(dim=-1)
    cosine = (first * last).sum(-1) / norms.clamp(min=MIN_NORM_PRODUCT)
    spare = n_k * (block_n // level) - whole
    total = torch.nn.functional.pad(cosine, (0, spare)).unflatten(2, (n_k, -1)).sum(-1)
    starts = torch.arange(n_k, device=k.device) * block_n
    count = (kv_len - starts).clamp(max=block_n) // level
    return torch.where(count > 0, total / count.clamp(min=1), -torch.inf)
