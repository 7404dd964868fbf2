"""The Pallas kernels compile for an H200 within their budgets (mosaic_aot.py, scores_aot.py)."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

GATES = [Path(__file__).with_name(f"{name}_aot.py") for name in ("mosaic", "scores")]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None
    or importlib.util.find_spec("jax_plugins.xla_cuda13") is None,
    reason="needs jax-cuda13-plugin and nvidia-cuda-nvcc to compile for CUDA",
)
@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.stem)
def test_every_kernel_is_within_its_budget(gate):
    run = subprocess.run([sys.executable, gate, "--all"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "negative control caught" in run.stdout
