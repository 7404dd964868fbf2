"""The Triton kernels are interpreted here as in tests/torch, and with the same mends."""

import tests.torch.conftest  # noqa: F401 - sets TRITON_INTERPRET where there is no GPU
