"""Scores of blocks as Triton kernels (specification, section 5).

`pooled` and `sampled` are largest products of rows that stand for the blocks (`samples`), computed
by `peaks` on any GPU and by the warp-specialised kernel of `hopper` where it fits; `antidiagonal`
is a kernel of its own. `tiles` says which kernel a call gets, and with what sizes.
"""

import torch
from torch import Tensor

from psa_torch.kernels._launch import require_dtype
from psa_torch.kernels.scores.antidiagonal import antidiagonal_scores
from psa_torch.kernels.scores.peaks import pooled_scores, sampled_scores
from shared_specs.config import PSAConfig

_ESTIMATORS = {
    "pooled": pooled_scores,
    "sampled": sampled_scores,
    "antidiagonal": antidiagonal_scores,
}


def block_scores(q: Tensor, k: Tensor, config: PSAConfig) -> Tensor:
    """Scores of every (query block, key block) pair by `config.importance`.

    Args:
        q: `[B, H, Lq, D]`, float16, bfloat16 or float32, any strides.
        k: `[B, Hk, Lk, D]`, same dtype, `H % Hk == 0`.
        config: block sizes, estimator and its parameters, `causal`, `scale`.

    Returns:
        float32 `[B, H, Nq, Nk]`, at least 0; 0 where no row sees a column.

    Raises:
        TypeError: dtype other than the three.
    """
    require_dtype("q", q, (torch.float16, torch.bfloat16, torch.float32))
    require_dtype("k", k, (q.dtype,))
    return _ESTIMATORS[config.importance](q.detach(), k.detach(), config)
