"""Lets the tests of this folder import its `models.py`, and seeds weights and inputs."""

import sys
import zlib
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def seeded(request) -> None:
    """Fresh weights and inputs for every test, the same in every run, as `rng` has elsewhere."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
