"""Pyramid sparse attention in Pallas on Mosaic GPU, for Hopper."""

from psa_jax.attention.mosaic.api import forward

__all__ = ["forward"]
