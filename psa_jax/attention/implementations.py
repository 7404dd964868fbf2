"""The implementations of attention by name, and which of them runs."""

from typing import Protocol

from jax import Array

from psa_jax._arrays import announce, platform_of
from psa_jax.attention import gather
from shared_specs import dispatch


class Implementation(Protocol):
    """What an entry of `IMPLEMENTATIONS` provides; a module with these functions will do.

    `levels` is dense int32 `[B, H, Nq, Nk]`; lse is float32 (float64 for float64), natural log,
    -inf on rows that see nothing.
    """

    def unsupported(self, q: Array, k: Array, v: Array, block_m: int, block_n: int) -> str | None:
        """Why it cannot run on this input, or None if it can."""
        ...

    def forward(
        self,
        q: Array,
        k: Array,
        v: Array,
        levels: Array,
        *,
        block_m: int,
        block_n: int,
        scale: float,
        is_causal: bool,
    ) -> tuple[Array, Array]:
        """out and lse."""
        ...

    def backward(
        self,
        dout: Array,
        dlse: Array | None,
        q: Array,
        k: Array,
        v: Array,
        levels: Array,
        out: Array,
        lse: Array,
        *,
        block_m: int,
        block_n: int,
        scale: float,
        is_causal: bool,
    ) -> tuple[Array, Array, Array]:
        """dq, dk and dv in the dtypes of q, k and v."""
        ...


class _Mosaic:
    """`psa_jax.attention.mosaic`, imported when it is first used: it brings Pallas along."""

    @staticmethod
    def unsupported(q: Array, k: Array, v: Array, block_m: int, block_n: int) -> str | None:
        from psa_jax.attention import mosaic

        return mosaic.unsupported(q, k, v, block_m, block_n)

    @staticmethod
    def forward(*args, **kwargs) -> tuple[Array, Array]:
        from psa_jax.attention import mosaic

        return mosaic.forward(*args, **kwargs)

    @staticmethod
    def backward(*args, **kwargs) -> tuple[Array, Array, Array]:
        from psa_jax.attention import mosaic

        return mosaic.backward(*args, **kwargs)


IMPLEMENTATIONS: dict[str, Implementation] = {"mosaic": _Mosaic(), "gather": gather}
"""Best first: what runs by itself is the first that can."""


def choose(
    implementation: str | None, q: Array, k: Array, v: Array, *, block_m: int, block_n: int
) -> str:
    """Name of the implementation that runs.

    Args:
        implementation: a key of `IMPLEMENTATIONS`, used or refused; or None: `mosaic` on a GPU
            where it supports the input, else `gather`. That choice is logged once with its
            reason (logger `psa_jax`, level info).

    Raises:
        ValueError: the name is unknown, or what was chosen cannot run on this input.
    """
    where = platform_of(q)

    def reason_against(name: str) -> str | None:
        if implementation is None and name == "mosaic" and where != "gpu":
            return f"q is on {where}, not gpu"
        return IMPLEMENTATIONS[name].unsupported(q, k, v, block_m, block_n)

    chosen, passed_over = dispatch.choose(implementation, IMPLEMENTATIONS, reason_against)
    if implementation is None:
        announce("attention runs as %r: %s", chosen, passed_over or f"q is on {where}")
    return chosen
