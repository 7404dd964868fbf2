"""What the package computes does not depend on the switches that a program sets for JAX.

`jax_numpy_rank_promotion` and `jax_numpy_dtype_promotion` make JAX refuse what NumPy broadcasts and
promotes, so that programs find mistakes of their own; `jax_enable_x64` makes 64-bit integers of
Python's. The functions of this package are traced by NumPy's rules under all of them.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")


def numpy_rules(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, traced with NumPy's broadcasting and promotion."""

    @functools.wraps(function)
    def ruled(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return ruled


def of_32_bits(function: Callable[P, R]) -> Callable[P, R]:
    """The same, with Python's numbers in 32 bits: for kernels, which take no 64-bit arrays."""

    @functools.wraps(function)
    def ruled(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.enable_x64(False):
            return numpy_rules(function)(*args, **kwargs)

    return ruled
