"""How an implementation meets JAX's transformations: derivatives of both modes, and `vmap`."""

import dataclasses
import functools
from typing import Any

import jax
from jax import Array

from psa_jax._sharding import vary_alike
from psa_jax._switches import numpy_rules
from psa_jax._vmap import vmap_as_batch
from psa_jax.attention import linear
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
    def forward(self, *arrays: Array) -> Any:
        """out and lse of q, k, v and levels."""
        return vary_alike(vmap_as_batch(self._forward)(*arrays), *arrays)

    def _forward(self, *arrays: Any) -> tuple[Array, Array]:
        q, k, v, levels = arrays
        out, lse = IMPLEMENTATIONS[self.implementation].forward(*arrays, **self._options())
        if self.rest == "mean":
            return means_of_rest.add_means(q, k, v, levels, out, lse, **self._options())
        return out, lse

    def effects(self, run: Any, types: Any) -> Any:
        """Effects of `run` with this call on these types: interpreted kernels have some."""
        if self.implementation != "mosaic":
            return frozenset()
        from psa_jax._mosaic.device import interpreter  # brings Pallas along

        if interpreter() is None:
            return frozenset()
        arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in types]
        return jax.make_jaxpr(functools.partial(run, call=self))(*arrays).effects

    @numpy_rules
    def backward(self, dout: Array, dlse: Array | None, *arrays: Array) -> tuple[Array, ...]:
        """dq, dk and dv; arrays are q, k, v, levels, out and lse."""
        q, k, v, levels, out, lse = arrays
        given = dout, dlse, q, k, v, levels, out, lse
        found = IMPLEMENTATIONS[self.implementation].backward(*given, **self._options())
        if self.rest == "mean":
            found = means_of_rest.add_gradients(*given, found, **self._options())
        return found

    @numpy_rules
    def tangent(self, *arrays: Array) -> tuple[Array, Array]:
        """Tangents of out and lse; arrays are tq, tk, tv, q, k, v, levels, out and lse."""
        tq, tk, tv, q, k, v, levels, out, lse = arrays
        given = tq, tk, tv, q, k, v, levels, lse
        moved = IMPLEMENTATIONS[self.implementation].tangent(*given, **self._options())
        if self.rest == "mean":
            moved = means_of_rest.add_tangents(*given, moved, **self._options())
        return moved.tangents(out.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def attention(call: Call, q: Array, k: Array, v: Array, levels: Array) -> tuple[Array, Array]:
    """out and lse, differentiable in q, k and v in forward and in reverse mode, once."""
    return call.forward(q, k, v, levels)


@attention.defjvp
def _attention_jvp(call: Call, primals: tuple[Array, ...], tangents: tuple[Array, ...]):
    out, lse = attention(call, *primals)
    return (out, lse), linear.tangent(call, tangents[:3], (*primals, out, lse))
