"""Repeated launches are the launches that Triton makes: the same kernels, the same parameters."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import psa_torch
from tests.conftest import _has_cuda_driver

pytest.importorskip("triton")
from psa_torch._triton.recording import _Allocation, _packed  # noqa: E402

HERE = Path(__file__).parent
CASES = [
    node.name
    for node in ast.parse((HERE / "launches_on_stub.py").read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("case_")
]
COMPILER = shutil.which("cc") or shutil.which("gcc")


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict[str, str]:
    """What became of every case, by name; '' for one that passed."""
    if COMPILER is None or _has_cuda_driver():
        pytest.skip("needs a C compiler, and no CUDA driver: with one, see tests/gpu")
    stub = tmp_path_factory.mktemp("stub") / "libcuda.so.1"
    name = "-Wl,-soname,libcuda.so.1"
    source = str(HERE / "cuda_stub.c")
    subprocess.run([COMPILER, "-shared", "-fPIC", name, "-o", str(stub), source], check=True)
    done = subprocess.run(
        [sys.executable, str(HERE / "launches_on_stub.py"), str(stub)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_on_a_driver_that_writes_launches_down(report, case):
    assert report[case] == ""


def test_every_kernel_is_launched_where_a_recording_sees_it():
    """`kernel[grid](...)` would be left out of what is repeated."""
    package = Path(psa_torch.__file__).parent
    sources = {path: ast.parse(path.read_text()) for path in package.rglob("*.py")}
    nodes = [(path, node) for path, tree in sources.items() for node in ast.walk(tree)]
    kernels = {
        node.name
        for _, node in nodes
        if isinstance(node, ast.FunctionDef)
        and any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    }
    assert {"attention_forward", "attention_forward_hopper", "_pool_kernel"} < kernels
    launched = [
        (path.name, ast.unparse(node.func))
        for path, node in nodes
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
        # Tables of functions are subscripted too.
        if ast.unparse(node.func.value).split(".")[-1] in kernels | {"kernel"}
    ]
    assert launched == [("launch.py", "kernel[grid]")]


def test_pieces_that_are_there_together_are_apart():
    generator = torch.Generator().manual_seed(0)

    def number(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    for _ in range(200):
        pieces = []
        for _ in range(number(1, 9)):
            piece = _Allocation(0, number(1, 5000), number(0, 6))
            piece.last = number(piece.first, 7)
            pieces.append(piece)
        offsets, size = _packed(pieces)
        spans = [(at, at + x.size) for at, x in zip(offsets, pieces, strict=True)]
        assert all(at % 512 == 0 for at in offsets)
        assert max(end for _, end in spans) <= size <= sum(x.size + 512 for x in pieces)
        for i, (start, end) in enumerate(spans):
            for j, (other_start, other_end) in enumerate(spans[:i]):
                together = pieces[i].first <= pieces[j].last and pieces[j].first <= pieces[i].last
                assert not together or end <= other_start or other_end <= start


def test_memory_is_used_again():
    first, second, third = (_Allocation(0, 1000, launch) for launch in (0, 0, 1))
    first.last, second.last, third.last = 0, 1, 1
    assert _packed([first, second, third]) == ([0, 1024, 0], 2048)
