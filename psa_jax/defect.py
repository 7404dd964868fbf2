"""What pooling a key block would lose: estimated defects (specification, section 5, `defect`)."""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from psa_jax._switches import numpy_rules
from shared_specs.defect import defect_offsets
from shared_specs.geometry import cdiv


@numpy_rules
def defect_scores(
    q: Array,
    k: Array,
    *,
    block_m: int,
    block_n: int,
    sample_m: int,
    scale: float,
    causal: bool,
    rest_mean: bool,
) -> Array:
    """As `shared_specs.defect.defect_scores`, in float32 and one query block at a time.

    Returns:
        float32 `[B, H, Nq, Nk, 4]`; no gradient flows from it to q and k.

    Raises:
        ValueError: `sample_m` does not divide `block_m`.
    """
    offsets = defect_offsets(block_m, sample_m)
    q, k = lax.stop_gradient(q), lax.stop_gradient(k)
    (b, h, q_len, d), (_, h_kv, kv_len, _) = q.shape, k.shape
    n_q, n_k = cdiv(q_len, block_m), cdiv(kv_len, block_n)
    at = np.minimum(np.arange(n_q)[:, None] * block_m + offsets, q_len - 1).astype(np.int32)
    rows = q[:, :, at].astype(jnp.float32).reshape(b, h_kv, h // h_kv, n_q, sample_m, d) * scale
    keys = jnp.pad(k.astype(jnp.float32), [(0, 0), (0, 0), (0, n_k * block_n - kv_len), (0, 0)])
    columns = np.arange(n_k * block_n, dtype=np.int32)
    real = jnp.asarray(columns < kv_len)

    def one_block(block):
        left, places = block
        logits = jnp.einsum("bhgmd,bhnd->bhgmn", left, keys, precision=lax.Precision.HIGHEST)
        seen = jnp.broadcast_to(real, (sample_m, len(columns)))
        if causal:
            seen &= columns <= places[:, None] + (kv_len - q_len)
        return jnp.square(_lost_masses(logits, seen, real, block_n, rest_mean)).mean(3)

    scores = lax.map(one_block, (jnp.moveaxis(rows, 3, 0), jnp.asarray(at)))
    return jnp.moveaxis(scores, 0, 3).reshape(b, h, n_q, n_k, 4)


def _lost_masses(logits, seen, real, block_n: int, rest_mean: bool) -> Array:
    """M_1 - M_l for l in 2, 4, 8, rest: `[..., rows, Nk, 4]`."""

    def grouped(x, size):
        return x.reshape(*x.shape[:-1], -1, size)

    top = jnp.where(seen, logits, -jnp.inf).max(-1, keepdims=True)
    logits = logits - jnp.where(top == -jnp.inf, 0, top)
    mass = grouped(jnp.where(seen, jnp.exp(logits), 0), block_n).sum(-1)
    total = mass.sum(-1, keepdims=True)
    lost = []
    for level in (2, 4, 8, block_n):
        if level == block_n and not rest_mean:
            lost.append(mass)
            continue
        count = grouped(real, level).sum(-1)
        mean = grouped(logits * real, level).sum(-1) / jnp.maximum(count, 1)
        whole = grouped(seen | ~real, level).all(-1) & (count > 0)
        weights = jnp.where(whole, count * jnp.exp(mean), 0)
        lost.append(mass - grouped(weights, block_n // level).sum(-1))
    return jnp.stack(lost, -1) / jnp.where(total > 0, total, 1)[..., None]
