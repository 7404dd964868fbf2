"""What the README says works."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=["torch", "jax"])
def test_examples_run_as_written(example):
    # Shorter than written, so that the check stays quick; nothing else is changed.
    code = example.replace("4096", "512")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr


def test_every_command_named_exists(capsys):
    from shared_specs.cli import build_parser

    usage = build_parser().format_help()
    for command in re.findall(r"^\| `psa (\w+)", README, flags=re.MULTILINE):
        assert re.search(rf"^ +{command}\b", usage, flags=re.MULTILINE), command


def test_every_file_linked_exists():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    for link in links:
        assert "://" in link or (ROOT / link).is_file(), link


def test_every_make_target_named_exists():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"`?make (\w+)`?", README)) <= targets
