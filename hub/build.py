"""Build folders of psa_torch for Hugging Face's `kernels`: `python hub/build.py outputs/kernel`.

`kernels.get_kernel` imports a folder under a name of its own, beside an installed psa_torch if
there is one. So absolute imports of the packages are made relative, and operators get a namespace
of their own. What is written is Python only: kernels are compiled by Triton where they run.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("psa_torch", "shared_specs")
LEFT_OUT = ("conformance", "conformance.py", "distributed", "integrations", "tools")
"""Rooms that serve a checkout or other libraries."""
VARIANTS = {"torch-cpu": "cpu", "torch-cuda": "cuda"}
NAMESPACE = '"psa::'
INIT = '''"""Pyramid sparse attention for PyTorch."""

from .psa_torch import {names}

__all__ = {all}
'''


def sources() -> Iterator[Path]:
    """Files of the packages that go into a build, relative to the checkout."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*")):
            relative = path.relative_to(ROOT)
            if path.suffix in (".py", ".toml") and not set(relative.parts[1:]) & set(LEFT_OUT):
                yield relative


def relocated(text: str, path: Path, identity: str) -> str:
    """The module `path` as part of a package of another name.

    Args:
        text: its source.
        path: relative to the folder that holds the packages.
        identity: namespace of the operators.

    Raises:
        ValueError: an import of the packages that cannot be made relative, or one of what is left
            out.
    """
    lines = text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            if any(name.partition(".")[0] in PACKAGES for name in names):
                raise ValueError(f"{path}:{node.lineno}: write `from ... import` for {names}")
        elif isinstance(node, ast.ImportFrom) and not node.level:
            first, *rest = (node.module or "").split(".")
            if first not in PACKAGES:
                continue
            if set(rest) & set(LEFT_OUT):
                raise ValueError(f"{path}:{node.lineno}: {node.module} is not part of the build")
            absolute, line = f"from {node.module} import", lines[node.lineno - 1]
            if absolute not in line:
                raise ValueError(f"{path}:{node.lineno}: no `{absolute}` in this line")
            relative = f"from {'.' * len(path.parts)}{node.module} import"
            lines[node.lineno - 1] = line.replace(absolute, relative)
    return "".join(lines).replace(NAMESPACE, f'"{identity}::')


def exported() -> list[str]:
    """Names that `psa_torch` exports."""
    tree = ast.parse((ROOT / "psa_torch" / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    raise ValueError("psa_torch has no __all__")


def version() -> str:
    """That of the packages."""
    text = (ROOT / "shared_specs" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.*)"$', text, re.MULTILINE)[1]


def build(target: Path, identity: str) -> list[Path]:
    """Write the build folders under `target/build`, in place of what is there.

    Returns:
        The folders.
    """
    names, folders = exported(), []
    for variant, backend in VARIANTS.items():
        folder = target / "build" / variant
        shutil.rmtree(folder, ignore_errors=True)
        for path in sources():
            text = (ROOT / path).read_text(encoding="utf-8")
            to = folder / path
            to.parent.mkdir(parents=True, exist_ok=True)
            is_module = path.suffix == ".py"
            to.write_text(relocated(text, path, identity) if is_module else text, encoding="utf-8")
        init = INIT.format(names=", ".join(names), all=json.dumps(names))
        (folder / "__init__.py").write_text(init, encoding="utf-8")
        about = {
            "id": identity,
            "name": "pyramid-sparse-attention",
            "version": int(version().split(".")[0]),
            "license": "Apache-2.0",
            "backend": {"type": backend},
            "python-depends": [],
        }
        (folder / "metadata.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        shutil.copy(ROOT / "LICENSE", folder / "LICENSE")
        folders.append(folder)
    return folders


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and build."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path, help="folder that gets build/")
    parser.add_argument("--id", help="namespace of the operators; default: from the version")
    args = parser.parse_args(argv)
    identity = args.id or "_psa_" + version().replace(".", "_")
    if not identity.isidentifier():
        parser.error(f"--id must be a Python identifier, got {identity!r}")
    for folder in build(args.target, identity):
        print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
