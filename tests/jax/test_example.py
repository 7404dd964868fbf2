"""The Flax example runs, as a reader would run it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_example_has_a_sparse_output_and_a_gradient():
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "flax_nnx.py"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "output (1, 384, 64), difference to all blocks at level 1: " in done.stdout
    assert "norm of its gradient" in done.stdout and "nan" not in done.stdout
