"""How an implementation meets JAX's transformations: reverse-mode gradients and `vmap`."""

import dataclasses
import functools

import jax
from jax import Array

from psa_jax._sharding import vary_alike
from psa_jax._switches import numpy_rules
from psa_jax._vmap import vmap_as_batch
from psa_jax.attention import rest as means_of_rest
from psa_jax.attention.implementations import IMPLEMENTATIONS


@dataclasses.dataclass(frozen=True)
class Call:
    """Everything about a call that is not an array."""

    implementation: str
    block_m: int
    block_n: int
    scale: float
    is_causal: bool
    rest: str = "skip"

    def _options(self) -> dict:
        return {
            "block_m": self.block_m,
            "block_n": self.block_n,
            "scale": self.scale,
            "is_causal": self.is_causal,
        }

    @numpy_rules
    def forward(self, *arrays: Array) -> tuple[Array, Array]:
        """out and lse of q, k, v and levels."""
        return vary_alike(vmap_as_batch(self._forward)(*arrays), *arrays)

    def _forward(self, *arrays: Array) -> tuple[Array, Array]:
        found = IMPLEMENTATIONS[self.implementation].forward(*arrays, **self._options())
        if self.rest == "mean":
            found = means_of_rest.add_means(*arrays, *found, **self._options())
        return found

    @numpy_rules
    def backward(self, dout: Array, dlse: Array | None, *arrays: Array) -> tuple[Array, ...]:
        """dq, dk and dv; arrays are q, k, v, levels, out and lse."""
        run = self._backward
        if dlse is None:
            gradients = vmap_as_batch(lambda dout, *rest: run(dout, None, *rest))(dout, *arrays)
        else:
            gradients = vmap_as_batch(run)(dout, dlse, *arrays)
        return vary_alike(gradients, *arrays)

    def _backward(self, *arrays: Array | None) -> tuple[Array, ...]:
        found = IMPLEMENTATIONS[self.implementation].backward(*arrays, **self._options())
        if self.rest == "mean":
            found = means_of_rest.add_gradients(*arrays, found, **self._options())
        return found


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention_with_lse(call: Call, q: Array, k: Array, v: Array, levels: Array):
    """(out, lse), with gradients through both."""
    return call.forward(q, k, v, levels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(call: Call, q: Array, k: Array, v: Array, levels: Array) -> Array:
    """out alone: its backward pass need not carry a gradient of lse."""
    return call.forward(q, k, v, levels)[0]


def _forward_with_lse(call: Call, *arrays: Array):
    out, lse = call.forward(*arrays)
    return (out, lse), (*arrays, out, lse)


def _forward(call: Call, *arrays: Array):
    (out, _), saved = _forward_with_lse(call, *arrays)
    return out, saved


def _backward_with_lse(call: Call, saved: tuple, gradients: tuple):
    dout, dlse = gradients
    return *call.backward(dout, dlse, *saved), None


def _backward(call: Call, saved: tuple, dout: Array):
    return *call.backward(dout, None, *saved), None


attention_with_lse.defvjp(_forward_with_lse, _backward_with_lse)
attention.defvjp(_forward, _backward)
