"""The attention kernels compile within their budgets (see attention_gate.py)."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

GATE = Path(__file__).with_name("attention_gate.py")


@pytest.mark.parametrize(
    "scope", [[], pytest.param(["--all"], marks=[pytest.mark.slow, pytest.mark.timeout(7200)])]
)
def test_every_kernel_is_within_its_budget(scope):
    """In a process of its own: the other tests have Triton's interpreter on."""
    run = subprocess.run([sys.executable, GATE, *scope], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "negative control caught" in run.stdout
