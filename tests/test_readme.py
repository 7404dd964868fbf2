"""What the README says works; pages link to what exists and are all in the site."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from shared_specs import __version__

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"] + sorted(
    path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")
)
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
    from shared_specs.tools.cli import build_parser

    usage = build_parser().format_help()
    for command in re.findall(r"^\| `psa (\w+)", README, flags=re.MULTILINE):
        assert re.search(rf"^ +{command}\b", usage, flags=re.MULTILINE), command


def test_it_stays_short():
    assert len(README.splitlines()) <= 180


@pytest.mark.parametrize("page", PAGES)
def test_every_file_linked_exists(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose):
        assert "://" in link or (ROOT / page).parent.joinpath(link).is_file(), link


def test_every_page_is_in_the_navigation_of_the_site():
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = re.findall(r"[\w/-]+\.md$", site.partition("\nnav:\n")[2], flags=re.MULTILINE)
    made = re.findall(r'": "([\w-]+\.md)"', (ROOT / "docs/_site/hooks.py").read_text())
    pages = [page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")]
    assert len(made) == 3 and sorted(named) == sorted(pages + made)


def test_the_citation_is_of_this_version():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.+)$", citation, flags=re.MULTILINE)[1] == __version__
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_make_target_named_exists():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"`?make (\w+)`?", README)) <= targets
