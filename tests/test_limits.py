"""Limits of the packages: files that can be read in one go, calls that can be read in one look."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("psa_torch", "psa_jax", "shared_specs")
MOST_LINES = 450
MOST_ARGUMENTS = 12

WIDE = {
    # What users call, and its counterparts in NumPy: every argument of the specification by name.
    "psa_torch/attention/__init__.py": {"sparse_attention"},
    "psa_torch/functional.py": {"psa_attention"},
    "shared_specs/attention.py": {"sparse_attention_grad"},
    "shared_specs/conformance/adapter.py": {"backward"},
    "shared_specs/conformance/reference.py": {"backward"},
    # The schema of a torch operator is flat, and what is behind it follows.
    "psa_torch/attention/ops.py": {"attention_backward", "attention_tangent"},
    "psa_torch/attention/sequences.py": {"sequences_backward"},
    "psa_torch/attention/gather/tangent.py": {"tangent"},
    "psa_torch/attention/rest/__init__.py": {"add_gradients", "add_tangents"},
    # The contract's twelve arguments, and tile sizes for tests and benchmarks.
    "psa_torch/attention/triton/backward_pass.py": {"backward"},
    "psa_jax/attention/mosaic/api.py": {"backward"},
    # Called by flax.linen, which names what it passes.
    "psa_jax/linen.py": {"attend"},
    # Takes what jax.nn.dot_product_attention takes.
    "psa_jax/sdpa.py": {"dot_product_attention"},
}
"""Functions with more arguments because of who calls them."""


def files() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def functions(path: Path) -> list[ast.FunctionDef]:
    tree = ast.parse(path.read_text())
    return [x for x in ast.walk(tree) if isinstance(x, ast.FunctionDef | ast.AsyncFunctionDef)]


def is_jitted(function: ast.FunctionDef) -> bool:
    """Whether Triton or Gluon compiles it."""
    return any(".jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def width(function: ast.FunctionDef) -> int:
    """Arguments of a function, without `self` or `cls`."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args]
    bound = bool(named) and named[0].arg in ("self", "cls")
    collected = [x for x in (arguments.vararg, arguments.kwarg) if x]
    return len(named) - bound + len(arguments.kwonlyargs) + len(collected)


def launched(path: Path) -> set[str]:
    """Names in a file that stand where a kernel is launched: their arguments are pointers, strides
    and sizes one by one, as a GPU takes them, so they are as many as they are."""
    found: set[str] = set()
    for call in ast.walk(ast.parse(path.read_text())):
        if not isinstance(call, ast.Call):
            continue
        if isinstance(call.func, ast.Subscript):
            kernel = call.func.value
        elif ast.unparse(call.func) == "launch_kernel":
            kernel = call.args[0]
        else:
            continue
        found |= {x.id for x in ast.walk(kernel) if isinstance(x, ast.Name)}
    return found


def too_wide(path: Path, kernels: set[str]) -> list[str]:
    """Functions of a file that take more than they may."""
    allowed = WIDE.get(path.relative_to(ROOT).as_posix(), set())
    return [
        f"{path.relative_to(ROOT)}: {function.name} takes {width(function)}"
        for function in functions(path)
        if width(function) > MOST_ARGUMENTS
        and function.name not in allowed
        and not (is_jitted(function) and function.name in kernels)
    ]


def test_no_file_is_long():
    lengths = {path: len(path.read_text().splitlines()) for path in files()}
    assert {path: n for path, n in lengths.items() if n > MOST_LINES} == {}


def test_no_function_takes_many_arguments():
    """Nor does what kernels call, parts of a warp-specialised one included."""
    kernels = set().union(*(launched(path) for path in files()))
    assert [found for path in files() for found in too_wide(path, kernels)] == []


def test_what_is_allowed_more_arguments_needs_them():
    for name, allowed in WIDE.items():
        wide = {x.name for x in functions(ROOT / name) if width(x) > MOST_ARGUMENTS}
        assert allowed <= wide, name


MANY = ", ".join(f"x{i}" for i in range(MOST_ARGUMENTS + 1))


@pytest.mark.parametrize(
    ("source", "is_found"),
    [
        (f"def f({MANY}): pass", True),
        (f"class C:\n    def f(self, {MANY.removesuffix(', x12')}): pass", False),
        (f"@gluon.jit\ndef part({MANY}): pass\ngl.warp_specialize([(part, (0,))])", True),
        (f"@triton.jit\ndef f({MANY}): pass\n@triton.jit\ndef g(): f(1)", True),
        (f"@triton.jit\ndef f({MANY}): pass\nlaunch_kernel(f, (1,))", False),
        (f"@triton.jit(do_not_specialize=['x1'])\ndef f({MANY}): pass\nf[1,](0)", False),
        (f"def f({MANY}): pass\nlaunch_kernel(f, (1,))", True),
    ],
)
def test_the_count_itself(source, is_found, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "module.py"
    path.write_text(source)
    assert bool(too_wide(path, launched(path))) == is_found
