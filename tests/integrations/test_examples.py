"""The examples run offline, as a reader would run them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = {
    "wan": ("diffusers", ["blocks.0.attn1: 4 dense step, 8 sparse", "density of the sparse calls"]),
    "cogvideox": ("diffusers", ["transformer_blocks.0.attn1: 4 sparse", "removed: True"]),
    "qwen2_5_vl": ("transformers", ["227 tokens read, 4 written", "'sparse': 2, 'decode': 6"]),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_says_what_it_should(name):
    library, words = EXAMPLES[name]
    pytest.importorskip(library)
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / f"{name}.py"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in words), done.stdout


def test_every_example_is_tested():
    names = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert names == {*EXAMPLES, "flax_nnx"}  # the last one in tests/jax
