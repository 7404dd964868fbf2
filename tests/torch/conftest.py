"""Without an NVIDIA driver the Triton kernels run in Triton's interpreter.

Triton reads the setting when a kernel is defined, so it is made here, before any test module of
this directory is imported.
"""

import os
import shutil

import pytest
import torch

if not (os.path.exists("/dev/nvidia0") or shutil.which("nvidia-smi")):
    os.environ.setdefault("TRITON_INTERPRET", "1")

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.support import triton_interpreter

    triton_interpreter.mend()


@pytest.fixture
def poisoned_memory():
    """Every uninitialised tensor holds NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)
