"""Compile the attention kernels as they would be launched, without a GPU, and judge them.

The launching functions run on tensors without storage, and what they would launch is recorded:
so what is compiled here is what ships, tile sizes included.

    python tests/gates/attention_gate.py [--all] [--arch 90] [--filter TEXT]

Exit status 1 if a kernel breaks its budget, or if the negative control does not.
"""

import argparse
import contextlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).parent)]

import machine_code  # noqa: E402  (first: it turns the interpreter off)
import torch  # noqa: E402
from machine_code import MachineCode  # noqa: E402

from psa_torch.attention.triton import (  # noqa: E402
    backward_pass,
    coarse_gradient,
    configs,
    forward_pass,
    key_gradient,
    query_gradient,
    row_statistics,
)
from psa_torch.attention.triton.configs import (  # noqa: E402
    BackwardConfig,
    ForwardConfig,
    HopperForwardConfig,
)
from psa_torch.attention.triton.hopper import forward as forward_hopper  # noqa: E402
from psa_torch.attention.triton.hopper import key_gradient as key_gradient_hopper  # noqa: E402
from psa_torch.attention.triton.hopper import query_gradient as query_gradient_hopper  # noqa: E402
from psa_torch.attention.triton.hopper import units  # noqa: E402
from psa_torch.attention.triton.plan import Plan  # noqa: E402
from psa_torch.attention.triton.rows import rows_of_pyramid  # noqa: E402
from psa_torch.pyramid import Pyramid  # noqa: E402
from shared_specs.constants import BLOCK_M, BLOCK_N  # noqa: E402
from shared_specs.geometry import Geometry  # noqa: E402

REGISTERS = 65_536
KERNELS = [
    (forward_pass, "attention_forward"),
    (forward_hopper, "attention_forward_hopper"),
    (row_statistics, "row_statistics"),
    (query_gradient, "query_gradient"),
    (query_gradient_hopper, "query_gradient_hopper"),
    (units, "_units_kernel"),
    (key_gradient, "key_gradient"),
    (key_gradient_hopper, "key_gradient_hopper"),
    (coarse_gradient, "coarse_partials"),
    (coarse_gradient, "coarse_sums"),
]
CONFIGURED = [configs, forward_hopper, query_gradient_hopper, key_gradient_hopper]
LENGTH = 75_600

LOOP_BUDGETS = {
    ("attention_forward", 64): 560,
    ("attention_forward", 128): 665,
    ("attention_forward_hopper", 64): 512,
    ("attention_forward_hopper", 128): 557,
    ("query_gradient", 64): 535,
    ("query_gradient", 128): 465,
    ("query_gradient_hopper", 64): 425,
    ("query_gradient_hopper", 128): 328,
    ("key_gradient", 64): 575,
    ("key_gradient", 128): 720,
    ("key_gradient_hopper", 64): 466,
    ("key_gradient_hopper", 128): 525,
    ("coarse_partials", 64): 800,
    ("coarse_partials", 128): 1000,
}
"""Instructions of a main loop on sm_90 by (kernel, D): 5 % over the larger of 3.6 and 3.9."""

SPILLS = {
    "attention_forward_hopper": 294,
    "query_gradient": 64,
    "query_gradient_hopper": 364,
    "key_gradient": 700,
    "key_gradient_hopper": 244,
    "coarse_partials": 620,
}
"""Bytes that a kernel may spill, nearly all of it outside its loops."""

LOCAL_IN_LOOP = {
    ("key_gradient", False): 12,
    ("key_gradient", True): 48,
    ("key_gradient_hopper", False): 1,
    ("key_gradient_hopper", True): 6,
    ("coarse_partials", False): 19,
    ("coarse_partials", True): 3,
}
"""Loads and stores of spilled registers in one main loop, by (kernel, causal)."""

WIDE = {"coarse_partials": "STG.128", "coarse_sums": "LDG.128"}
"""How a kernel moves the bulk of its numbers."""

WARP_SPECIALISED = {
    "attention_forward_hopper",
    "query_gradient_hopper",
    "key_gradient_hopper",
}
"""Kernels in which some warps copy and two warpgroups multiply."""

TWO_PROGRAMS = {"coarse_partials"}
"""Kernels of which two programs share a multiprocessor of sm_90."""

HALF_PROCESSOR = 228 * 1024 // 2 - 1024
"""Shared memory of a program for that, less what the system takes."""


@dataclass(frozen=True)
class Case:
    """One call of the forward, or of the backward with its kernels."""

    direction: str
    head_dim: int = 128
    value_dim: int | None = None  # None: head_dim
    dtype: torch.dtype = torch.bfloat16
    block_m: int = 128
    block_n: int = 64
    is_causal: bool = False
    arch: int = 90
    config: ForwardConfig | HopperForwardConfig | BackwardConfig | None = None

    def __str__(self):
        dtype = str(self.dtype).removeprefix("torch.")
        of_values = f"Dv={self.value_dim} " if self.value_dim else ""
        return (
            f"sm_{self.arch} {self.direction} D={self.head_dim} {of_values}{dtype} "
            f"{self.block_m}x{self.block_n}{' causal' if self.is_causal else ''}"
            f"{' ' + type(self.config).__name__ if self.config else ''}"
        )


@dataclass
class Launch:
    kernel: object
    args: tuple
    options: dict

    @property
    def name(self) -> str:
        return self.kernel.__name__

    def label(self) -> str:
        return f"{self.name} level {2 ** self.options['G']}" if "G" in self.options else self.name


class _Recorder:
    """Stands in for a kernel and keeps every launch."""

    def __init__(self, kernel, launches: list[Launch]):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append(Launch(self.kernel, args, options))


def launches(case: Case) -> list[Launch]:
    """The launches of one call, with the tile sizes of the table or those of `case.config`."""

    def tensor(*shape, dtype=case.dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    heads, kv_heads = 24, 6
    geometry = Geometry(LENGTH, LENGTH, case.block_m, case.block_n, case.is_causal)
    q_blocks, k_blocks = geometry.q_blocks, geometry.k_blocks
    q = tensor(1, heads, LENGTH, case.head_dim)
    pyramid = Pyramid(
        *(
            tensor(1, kv_heads, geometry.pyramid_rows, head_dim)
            for head_dim in (case.head_dim, case.value_dim or case.head_dim)
        )
    )
    out = tensor(1, heads, LENGTH, case.value_dim or case.head_dim)

    def plan(rows, columns):
        count = tensor(1, heads, rows, 4, dtype=torch.int32)
        return Plan(tensor(1, heads, rows, columns, dtype=torch.int32), count, count)

    by_query = plan(q_blocks, k_blocks)
    lse = tensor(1, heads, LENGTH, dtype=torch.float32)
    found: list[Launch] = []
    with contextlib.ExitStack() as stack:
        for module, name in KERNELS:
            recorder = _Recorder(getattr(module, name), found)
            stack.enter_context(mock.patch.object(module, name, recorder))
        for module in CONFIGURED:
            arch = divmod(case.arch, 10)
            stack.enter_context(mock.patch.object(module, "capability", lambda _, arch=arch: arch))
        if case.direction == "forward":
            forward_pass.forward_planned(
                q, pyramid, by_query, geometry, scale=0.1, config=case.config
            )
        else:
            levels = tensor(1, heads, q_blocks, k_blocks, dtype=torch.int32)
            kept = rows_of_pyramid(pyramid)
            rest = (kept, levels, by_query, plan(k_blocks, q_blocks), out, lse)
            config = case.config or configs.backward_config(q, out, case.block_m, case.block_n)
            backward_pass.backward_planned(out, lse, q, *rest, geometry, scale=0.1, config=config)
    return found


def breaches(case: Case, launch: Launch, code: MachineCode) -> list[str]:
    """What is wrong with the machine code of one launch."""
    found = [f"warning: {x}" for x in code.warnings]
    if code.shared_bytes > machine_code.SHARED_MEMORY[case.arch]:
        found.append(f"{code.shared_bytes} B of shared memory")
    if code.registers * code.warps * 32 > REGISTERS:
        found.append(f"{code.registers} registers for {code.warps} warps")
    if case.dtype == torch.float32 or case.head_dim > 128:
        # Float32 products run on CUDA cores, and 256 channels fill the register file: these
        # kernels are there to be right, and may spill.
        return found
    spills = SPILLS.get(launch.name, 0)
    if code.spill_bytes > spills:
        found.append(f"{code.spill_bytes} B spilled, allowed {spills}")
    if case.arch == 90 and case.head_dim in (64, 128) and case.value_dim is None:
        found += _loop_breaches(case, launch, code)
    if case.arch == 90 and launch.name in ("attention_forward", "query_gradient"):
        # Columns that are masked stay in pieces of 16 bytes.
        if not any(x.opcodes["LDGSTS.128"] for x in code.tensor_loops()):
            found.append("no loop with 16-byte copies")
    return found


def _loop_breaches(case: Case, launch: Launch, code: MachineCode) -> list[str]:
    found = []
    wide = WIDE.get(launch.name)
    if wide and not any(x.opcodes[wide] for x in code.loops):
        found.append(f"no loop with {wide}")
    if launch.name in TWO_PROGRAMS and code.shared_bytes > HALF_PROCESSOR:
        found.append(f"{code.shared_bytes} B of shared memory leave no room for a second program")
    if launch.name in ("row_statistics", "coarse_sums", "_units_kernel"):
        return found
    specialised = launch.name in WARP_SPECIALISED
    loops = code.tensor_loops()
    if any(x.opcodes["HMMA"] for x in loops):
        found.append("a loop multiplies by HMMA instead of wgmma")
    # The masked tail is not pipelined. In the warp-specialised kernel others do the copying; the
    # sums per query block have one loop without a mask, and another program multiplies meanwhile.
    main = [x for x in loops if x.opcodes["LDGSTS.128"]]
    if specialised:
        main = sorted(loops, key=lambda x: x.size)[:2]
    if launch.name == "coarse_partials":
        main = sorted(loops, key=lambda x: x.size)[:1]
    if not main:
        found.append("no pipelined loop with 16-byte copies")
    budget = LOOP_BUDGETS[launch.name, case.head_dim]
    local_allowed = LOCAL_IN_LOOP.get((launch.name, case.is_causal), 0)
    for loop in main:
        if loop.size > budget:
            found.append(f"loop of {loop.size} instructions, allowed {budget}")
        local = loop.opcodes["STL"] + loop.opcodes["LDL"]
        if local > local_allowed:
            found.append(f"spilled registers in a loop of {loop.size}: {local} loads and stores")
    return found


def judge(case: Case) -> list[str]:
    """Compile every kernel of one call, print what it takes, return what breaks a budget."""
    problems = []
    seen = set()
    for launch in launches(case):
        constants = tuple(sorted((k, str(v)) for k, v in launch.options.items()))
        if (launch.label(), constants) in seen:
            continue
        seen.add((launch.label(), constants))
        code = machine_code.compile_launch(
            launch.kernel, launch.args, dict(launch.options), case.arch
        )
        found = breaches(case, launch, code)
        problems += found
        print(
            f"{'FAIL' if found else 'ok  '} {case} {launch.label()}: {code.registers} registers, "
            f"{code.spill_bytes} B spilled, {code.shared_bytes} B shared, "
            f"loops {[x.size for x in code.tensor_loops()]} {'; '.join(found)}",
            flush=True,
        )
    return problems


def every_case():
    """All shipped configurations; float16 compiles to the code of bfloat16 but for its products."""
    for arch in (90, 80, 100):
        for head_dim in configs.HEAD_DIMS:
            for dtype in (torch.bfloat16, torch.float32):
                for block_m in BLOCK_M:
                    for block_n in BLOCK_N:
                        for is_causal in (False, True):
                            if arch != 90 and (block_n != 64 or is_causal):
                                continue
                            if block_m == 64 and block_n != 64:
                                continue
                            for direction in ("forward", "backward"):
                                yield Case(
                                    direction,
                                    head_dim,
                                    None,
                                    dtype,
                                    block_m,
                                    block_n,
                                    is_causal,
                                    arch,
                                )
        for head_dim, value_dim in BETWEEN:
            for direction in ("forward", "backward"):
                yield Case(direction, head_dim, value_dim, arch=arch)
    for case in HOPPER:
        yield case
        yield replace(case, dtype=torch.float16)
        yield replace(case, is_causal=True)
    yield Case("backward", dtype=torch.float16)


HOPPER = [
    Case("forward", head_dim=head_dim, config=config)
    for head_dim, config in configs.HOPPER_FORWARD.items()
]

BETWEEN = [(8, None), (72, None), (80, None), (96, None), (160, None), (192, 128), (64, 128)]
"""Head dimensions of keys and values that no kernel has for its width."""

SAMPLE = [
    HOPPER[1],
    Case("forward", block_m=64),
    Case("backward"),
    Case("forward", head_dim=64, arch=80),
    Case("forward", arch=100),
]


def negative_control_fails() -> bool:
    """A tile of 128 keys on 4 warps spills and serialises its products: it must be found out."""
    narrow = ForwardConfig(rows=128, tile=128, tail=64, warps=4, stages=3)
    return bool(judge(Case("forward", config=narrow)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every configuration and architecture")
    parser.add_argument("--arch", type=int, help="only this architecture")
    parser.add_argument("--filter", default="", help="only cases whose name holds this text")
    options = parser.parse_args()
    cases = [
        case
        for case in (every_case() if options.all else SAMPLE)
        if options.arch in (None, case.arch) and options.filter in str(case)
    ]
    failed = [case for case in cases if judge(case)]
    caught = negative_control_fails()
    print(f"{len(failed)} of {len(cases)} calls over budget")
    print(f"negative control {'' if caught else 'not '}caught")
    return 1 if failed or not caught else 0


if __name__ == "__main__":
    sys.exit(main())
