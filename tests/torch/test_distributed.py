"""Heads split over two processes: equal outputs and gradients, with and without DTensor."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("heads_over_processes.py")
ROOT = SCRIPT.parents[2]


def test_two_processes_each_take_half_of_the_heads(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    members = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(rank), "2", str(tmp_path / "store")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [member.communicate(timeout=200)[0] for member in members]
    finally:
        for member in members:
            member.kill()
    for member, output in zip(members, outputs, strict=True):
        assert member.returncode == 0, output
