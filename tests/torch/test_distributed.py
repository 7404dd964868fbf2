"""Heads, or the sequence, split over processes: equal levels, outputs and gradients."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def run(script, world, store):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    members = [
        subprocess.Popen(
            [sys.executable, HERE / script, str(rank), str(world), str(store)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        outputs = [member.communicate(timeout=200)[0] for member in members]
    finally:
        for member in members:
            member.kill()
    for member, output in zip(members, outputs, strict=True):
        assert member.returncode == 0, output


def test_two_processes_each_take_half_of_the_heads(tmp_path):
    run("heads_over_processes.py", 2, tmp_path / "store")


@pytest.mark.parametrize("world", (2, 3))
def test_a_sequence_over_processes_is_that_of_one(tmp_path, world):
    run("sequence_over_processes.py", world, tmp_path / "store")
