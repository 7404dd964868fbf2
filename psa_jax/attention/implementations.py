"""The implementations of attention by name, and which of them runs."""

import logging
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

    def tangent(
        self,
        tq: Array,
        tk: Array,
        tv: Array,
        q: Array,
        k: Array,
        v: Array,
        levels: Array,
        lse: Array,
        *,
        block_m: int,
        block_n: int,
        scale: float,
        is_causal: bool,
    ) -> gather.Moved:
        """Forward mode: what the tangents of out and lse are made of."""
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

    @staticmethod
    def tangent(*args, **kwargs) -> gather.Moved:
        announce(
            "forward-mode derivatives of %r are computed by 'gather': %s",
            "mosaic",
            "no kernel makes them; selected rows are copied for each query block, which costs "
            "memory traffic that a kernel would not have",
            level=logging.WARNING,
        )
        return gather.tangent(*args, **kwargs)


IMPLEMENTATIONS: dict[str, Implementation] = {"mosaic": _Mosaic(), "gather": gather}
"""Best first: what runs by itself is the first that can."""


def choose(
    implementation: str | None, q: Array, k: Array, v: Array, *, block_m: int, block_n: int
) -> str:
    """Name of the implementation that runs.

    Args:
        implementation: a key of `IMPLEMENTATIONS`, used or refused; or None: `mosaic` on a GPU
            where it supports the input, else `gather`. That choice is logged once with its
            reason (logger `psa_jax`, level info; on a GPU that `mosaic` cannot use, warning).

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
        message = "attention runs as %r: %s"
        if chosen == "gather" and where == "gpu":
            cost = (
                "; it copies the selected rows of every query block through memory, which a kernel "
                "does not"
            )
            announce(message + cost, chosen, passed_over, level=logging.WARNING)
        else:
            announce(message, chosen, passed_over or f"q is on {where}")
    return chosen
