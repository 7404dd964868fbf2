"""An own video block in Flax NNX whose attention is PSA: forward, gradient, jit."""

import jax
import jax.numpy as jnp
from flax import nnx

from psa_jax import PSAConfig, attention_fn

GRID = (4, 8, 12)  # tokens: frames, height, width
TOKENS, WIDTH = 4 * 8 * 12, 64


class Block(nnx.Module):
    """Attention and a feed-forward layer, each with a norm before and a sum after."""

    def __init__(self, config: PSAConfig, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        # The one line: any Flax attention layer takes it.
        self.attention = nnx.MultiHeadAttention(
            num_heads=2,
            in_features=WIDTH,
            attention_fn=attention_fn(config),
            decode=False,
            rngs=rngs,
        )
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm(x))
        return x + self.down(nnx.gelu(self.up(x)))


@nnx.jit
def step(block: Block, x: jax.Array) -> tuple[jax.Array, nnx.State]:
    """Loss and its gradient."""
    return nnx.value_and_grad(lambda block: jnp.mean(block(x) ** 2))(block)


def main() -> None:
    x = jax.random.normal(jax.random.key(0), (1, TOKENS, WIDTH))
    everything = PSAConfig(
        block_m=64, mask_ratios={1: (0, 1)}, rearrange_method="Gilbert", grid=GRID
    )
    sparse = PSAConfig(block_m=64, rearrange_method="Gilbert", grid=GRID)
    exact = Block(everything, nnx.Rngs(0))(x)
    block = Block(sparse, nnx.Rngs(0))
    out = block(x)
    loss, gradient = step(block, x)
    norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradient)))
    print(f"output {out.shape}, difference to all blocks at level 1: ", end="")
    print(f"{jnp.linalg.norm(out - exact) / jnp.linalg.norm(exact):.2%}")
    print(f"loss {loss:.3f}, norm of its gradient {norm:.3f}")


if __name__ == "__main__":
    main()
