"""Several workers share one GPU: JAX must not reserve most of its memory in each."""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
