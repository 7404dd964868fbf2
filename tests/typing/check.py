"""`make types`: pyright over the packages, the typed callers here and the examples of the README.

Files with kernels are left out: a jitted function is not Python to a type checker, nor are the
references that a Pallas kernel reads and writes. So is what launches them: Triton has no types.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "outputs" / "typing"
PACKAGES = ("shared_specs", "psa_torch", "psa_jax")
KERNEL = re.compile(
    r"^@(triton\.jit|gluon\.jit|jit)\b|^import jax\.experimental\.pallas\.mosaic_gpu", re.MULTILINE
)
LAUNCHES = "psa_torch/_triton/*"


def kernel_files() -> list[Path]:
    """Files of the packages that hold kernels."""
    sources = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return sorted(
        path
        for path in sources
        if KERNEL.search(path.read_text(encoding="utf-8")) or path.match(LAUNCHES)
    )


def write_examples() -> None:
    """The Python of the README, a file for each block."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)):
        (WORK / f"readme_{number}.py").write_text(code, encoding="utf-8")


def main() -> int:
    WORK.mkdir(parents=True, exist_ok=True)
    for old in WORK.glob("readme_*.py"):
        old.unlink()
    write_examples()
    up = "../.."
    config = {
        "include": [".", f"{up}/tests/typing", *(f"{up}/{package}" for package in PACKAGES)],
        "exclude": [f"{up}/{path.relative_to(ROOT).as_posix()}" for path in kernel_files()],
        "extraPaths": [up],
        "typeCheckingMode": "basic",
        "pythonVersion": "3.11",
        "reportUnnecessaryTypeIgnoreComment": True,
        "reportMissingImports": False,  # of extras that are not installed
    }
    path = WORK / "pyrightconfig.json"
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")
    return subprocess.run(
        ["pyright", "--project", str(path), "--pythonpath", sys.executable, *sys.argv[1:]]
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
