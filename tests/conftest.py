"""What every test directory shares."""

import os
import shutil

import numpy as np
import pytest


def _has_cuda_driver() -> bool:
    """Whether an NVIDIA driver is present; asked without importing a framework."""
    return os.path.exists("/dev/nvidia0") or shutil.which("nvidia-smi") is not None


def pytest_collection_modifyitems(items):
    if _has_cuda_driver():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; no NVIDIA driver found here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def rng(request) -> np.random.Generator:
    """A generator seeded by the test's own name, so that every case has its own fresh inputs."""
    return np.random.default_rng(list(request.node.nodeid.encode()))
