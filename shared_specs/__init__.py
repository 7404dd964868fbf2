"""Pyramid sparse attention: configuration, rules and NumPy oracle, free of any framework.

The modules of this package are the specification made runnable: `psa_torch` and `psa_jax`
mirror them room for room, and the parity tests hold the three together. Only NumPy and the
standard library are imported. `tools` holds what is no specification: the `psa` command, the demo,
parity and figures.
"""

from shared_specs.config import PSAConfig
from shared_specs.constants import LEVELS

__version__ = "0.1.0"

__all__ = ["LEVELS", "PSAConfig", "__version__"]
