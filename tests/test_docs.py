"""What the guides say works: their code runs, block after block, as a reader would run it."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
GUIDES = ("pytorch", "jax")


@pytest.mark.parametrize("guide", GUIDES)
def test_the_code_of_a_guide_runs_from_top_to_bottom(guide):
    text = (DOCS / f"{guide}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) >= 7
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr


def test_the_table_of_fields_is_that_of_the_dataclass():
    spec = importlib.util.spec_from_file_location(
        "config_table", DOCS / "_site" / "config_table.py"
    )
    config_table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(config_table)
    page = (DOCS / "reference" / "config.md").read_text(encoding="utf-8")
    assert f"{config_table.BEGIN}\n{config_table.table()}\n{config_table.END}" in page
