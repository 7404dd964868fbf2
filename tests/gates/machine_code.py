"""Compile Triton kernels without a GPU and read what came out; not under the interpreter."""

import collections
import contextlib
import hashlib
import io
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
os.environ["TRITON_ALWAYS_COMPILE"] = "1"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_MEMORY = {80: 166_912, 90: 232_448, 100: 232_448}
"""Largest dynamic shared memory of a block, in bytes, by architecture."""


@dataclass
class Loop:
    """One loop of the machine code: instructions in all and of each kind."""

    size: int
    opcodes: collections.Counter


@dataclass
class MachineCode:
    """What ptxas said of one kernel and what its code holds."""

    arch: int
    warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    warnings: list[str]
    loops: list[Loop] = field(repr=False)
    digest: str
    """Hash of the instructions, without addresses and without the names of functions."""

    def tensor_loops(self) -> list[Loop]:
        """Innermost loops that multiply on tensor cores, in the order of the code."""
        return [x for x in self.loops if x.opcodes["HGMMA"] + x.opcodes["HMMA"]]


def signature(fn, types: dict[str, str], constants: dict):
    """ASTSource arguments. `types`: 'T' or 'T:16' (divisible by 16) of each run-time argument."""
    kinds, attributes, values = {}, {}, {}
    for place, name in enumerate(fn.arg_names):
        if name in constants:
            kinds[name], values[name] = "constexpr", constants[name]
            continue
        kind, divisor = types[name].removesuffix(":16"), types[name].endswith(":16") and 16
        kinds[name] = kind
        if divisor:
            attributes[(place,)] = [["tt.divisibility", divisor]]
    return kinds, values, attributes


def compile_kernel(
    fn,
    types: dict[str, str],
    constants: dict,
    *,
    arch: int,
    warps: int,
    stages: int = 3,
    **options,
) -> MachineCode:
    """Machine code of one specialisation of a Triton or Gluon function for `sm_<arch>`."""
    source = GluonASTSource if fn.is_gluon() else ASTSource
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        kernel = triton.compile(
            source(fn, *signature(fn, types, constants)),
            target=GPUTarget("cuda", arch, 32),
            options={"num_warps": warps, "num_stages": stages, **options},
        )
    return read(kernel, arch, warps, log.getvalue())


TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
}


def compile_launch(kernel, args: tuple, options: dict, arch: int) -> MachineCode:
    """Machine code of a launch `kernel[grid](*args, **options)`, specialised as the launcher does.

    Tensors may be on any device; their addresses count as multiples of 16.
    """
    values = {**dict(zip(kernel.arg_names, args, strict=False)), **options}
    types, constants = {}, {}
    for parameter in kernel.params:
        value = values.pop(parameter.name)
        special = type(value) is int and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and value == 1):
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            types[parameter.name] = f"*{TYPES[value.dtype]}:16"
        elif hasattr(value, "block_shape"):
            box = f"{TYPES[value.base.dtype]}{list(value.block_shape)}"
            types[parameter.name] = f"tensordesc<{box},{value.layout!r}>"
        elif isinstance(value, int):
            width = "i32" if value < 2**31 else "i64"
            types[parameter.name] = width + (":16" if special and value % 16 == 0 else "")
        else:
            types[parameter.name] = "fp32"
    warps, stages = values.pop("num_warps"), values.pop("num_stages", 3)
    return compile_kernel(kernel, types, constants, arch=arch, warps=warps, stages=stages, **values)


def read(kernel, arch: int, warps: int, log: str) -> MachineCode:
    """Resources and loops of a compiled kernel with the output of its ptxas."""
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.search(r"Used (\d+) registers", log)
    code, labels = _instructions(_disassemble(kernel.asm["cubin"]))
    return MachineCode(
        arch=arch,
        warps=warps,
        registers=int(registers[1]),
        spill_bytes=int(spills[1]) + int(spills[2]),
        shared_bytes=kernel.metadata.shared,
        warnings=[x for x in log.splitlines() if re.search(r"C75\d\d|serialized|warning", x, re.I)],
        loops=_loops(code, labels),
        digest=_digest(code),
    )


def _disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / "nvdisasm"), "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _instructions(sass: str) -> tuple[list[str], dict[str, int]]:
    """The instructions of a disassembly, and which of them each label stands before."""
    code, labels = [], {}
    for line in sass.splitlines():
        if label := re.match(r"^(\.L_x_\d+):", line.strip()):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(instruction[1].strip())
    return code, labels


def _digest(code: list[str]) -> str:
    # Functions are named after files and lines of the source.
    nameless = (re.sub(r"`\((?!\.L_x_)[^)]*\)|\$\S+", "NAME", line) for line in code)
    return hashlib.sha256("\n".join(nameless).encode()).hexdigest()[:16]


def _loops(code: list[str], labels: dict[str, int]) -> list[Loop]:
    """Innermost loops: backward branches whose body holds no other backward branch."""
    spans = []
    for end, instruction in enumerate(code):
        branch = re.search(r"\bBRA\S*\s.*?`\((\.L_x_\d+)\)", instruction)
        if branch and labels.get(branch[1], end) < end - 1:
            spans.append((labels[branch[1]], end))
    inner = [
        (a, b)
        for a, b in spans
        if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in spans)
    ]
    return [Loop(b - a + 1, _opcodes(code[a : b + 1])) for a, b in sorted(inner)]


def _opcodes(code: list[str]) -> collections.Counter:
    counter = collections.Counter()
    for instruction in code:
        opcode = re.sub(r"^@!?U?P\d+\s+", "", instruction).split()[0]
        counter[opcode.split(".")[0]] += 1
        if opcode.startswith(("LDG", "STG")) and "128" in opcode:
            counter[opcode.split(".")[0] + ".128"] += 1
    return counter
