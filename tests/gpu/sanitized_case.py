"""Small cases of every kernel, forward and backward, for a memory and race checker:

compute-sanitizer --tool memcheck python -m tests.gpu.sanitized_case torch
compute-sanitizer --tool racecheck --num-cuda-barriers 64 python -m tests.gpu.sanitized_case torch

The race checker follows as many memory barriers as it is told to. For `jax` put
XLA_FLAGS=--xla_gpu_enable_command_buffer= before it: the checker crashes on XLA's CUDA graphs.
"""

import sys

import numpy as np

from shared_specs import PSAConfig

CASES = (
    (PSAConfig(block_n=32, causal=True), 389),
    (PSAConfig(block_n=64, mask_mode="thresholdbound", importance="sampled"), 389),
    (PSAConfig(block_n=128, attn_impl="old_mask_type", use_sim_mask=True), 389),
    (PSAConfig(block_m=64, importance="antidiagonal"), 389),
    # The warp-specialised scores want 128 key blocks.
    (PSAConfig(block_n=32, causal=True), 4101),
)
"""Configurations and lengths."""


def torch_cases() -> None:
    import torch

    from psa_torch import psa_attention

    for config, length in CASES:
        q, k, v = (
            torch.randn(1, h, length, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for h in (4, 2, 2)
        )
        out = psa_attention(q, k, v, config=config, implementation="triton")
        grads = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
        assert all(bool(x.isfinite().all()) for x in (out, *grads))


def jax_cases() -> None:
    import jax
    import jax.numpy as jnp

    from psa_jax import psa_attention

    for config, length in CASES:
        keys = jax.random.split(jax.random.key(0), 3)
        q, k, v = (
            jax.random.normal(key, (1, h, length, 64), jnp.bfloat16)
            for key, h in zip(keys, (4, 2, 2), strict=True)
        )

        def loss(q, k, v, config=config):
            return psa_attention(q, k, v, config=config, implementation="mosaic").sum()

        for x in jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v):
            assert np.isfinite(np.asarray(x, np.float32)).all()


if __name__ == "__main__":
    {"torch": torch_cases, "jax": jax_cases}[sys.argv[1]]()
    print("ran", len(CASES), "configurations of", sys.argv[1])
