"""What importing each package loads, from the checkout and from the built wheel."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("shared_specs", "psa_torch", "psa_jax")

# Imports every module of a package in a process of its own and prints the top-level names that
# this brought in. `__main__` modules are programs, not imports.
WALK = """
import importlib, pkgutil, sys
before = set(sys.modules)
package = importlib.import_module(sys.argv[1])
for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    if not found.name.endswith("__main__"):
        importlib.import_module(found.name)
print(" ".join(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
"""


def fresh(code, *args, cwd=ROOT, path=None):
    """Run `code` in a new interpreter."""
    env = {**os.environ, "PYTHONPATH": str(path or ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
    )


def loaded_by(package, **where):
    done = fresh(WALK, package, **where)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_shared_specs_loads_numpy_and_the_standard_library_only():
    foreign = loaded_by("shared_specs") - set(sys.stdlib_module_names)
    assert foreign == {"numpy", "shared_specs"}


@pytest.mark.parametrize(("package", "other"), [("psa_torch", "jax"), ("psa_jax", "torch")])
def test_a_framework_package_never_loads_the_other_framework(package, other):
    loaded = loaded_by(package)
    assert package.removeprefix("psa_") in loaded
    assert not loaded & {other, f"psa_{other}", f"{other}lib"}


@pytest.mark.parametrize(
    ("package", "absent", "extra"),
    [("psa_torch", "torch", "torch"), ("psa_jax", "jax", "jax"), ("psa_jax", "flax", "jax")],
)
def test_a_missing_framework_is_named_with_the_extra_that_brings_it(package, absent, extra):
    code = f"import sys; sys.modules[{absent!r}] = None; import {package}"
    code += f"; {package}.PSAAttention"
    done = fresh(code)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError:"), done.stderr
    assert f"pyramid-sparse-attention[{extra}]" in last


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy so that the checkout stays clean."""
    source = tmp_path_factory.mktemp("source")
    for package in PACKAGES:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, source / package, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    built = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(built)]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(built.glob("*.whl"))


def test_wheel_holds_every_file_of_the_packages_and_nothing_else(wheel):
    expected = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        info = {Path(name).name: name for name in archive.namelist() if ".dist-info/" in name}
        entry_points = archive.read(info["entry_points.txt"]).decode()
    assert names == expected
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    assert "psa = shared_specs.tools.cli:main" in entry_points
    assert "LICENSE" in info


def test_import_rules_hold_for_the_wheel_outside_the_checkout(wheel, tmp_path):
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    where = {"cwd": tmp_path, "path": site}
    for package in PACKAGES:
        done = fresh(f"import {package}; print({package}.__file__)", **where)
        assert done.stdout.startswith(str(site)), done.stdout + done.stderr
    foreign = loaded_by("shared_specs", **where) - set(sys.stdlib_module_names)
    assert foreign == {"numpy", "shared_specs"}
    assert "jax" not in loaded_by("psa_torch", **where)
    assert "torch" not in loaded_by("psa_jax", **where)
    listed = fresh("from shared_specs.tools.cli import main; main(['presets'])", **where)
    assert "wan2.1-14b" in listed.stdout, listed.stderr
