"""Compile the mosaic kernels to machine code for an H200 without a GPU, and read ptxas' report.

    python tests/gates/mosaic_aot.py [--all]

Needs `jax-cuda13-plugin`, `jax-cuda13-pjrt` (of the installed JAX) and `nvidia-cuda-nvcc`. A
kernel fails on spilled registers, a serialised wgmma, or shared memory over the limit. At the end
a configuration that must spill is compiled, to see that the gate can fail.
"""

import argparse
import dataclasses
import itertools
import os
import re
import sys
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["MOSAIC_GPU_DUMP_TO"] = tempfile.mkdtemp(prefix="mosaic_aot_")
os.environ["MOSAIC_GPU_DUMP_PTX"] = os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from psa_jax.attention import mosaic
from psa_jax.attention.mosaic.configs import Config, default_config

DUMP = Path(os.environ["MOSAIC_GPU_DUMP_TO"])
TARGET = Path(__file__).with_name("h200.txtpb")
SHARED_MEMORY = 232_448
SPILLED_BYTES = {
    "forward": 0,
    "query_gradient": 8,
    "key_gradient": 64,
    "coarse_partials": 384,
    "coarse_sums": 0,
}
"""Allowed by kernel, for addresses outside the loops that multiply: dk and dv fill their consumers'
registers, so that a few addresses wait in local memory until the end. In slots the compiler also
takes descriptors of the resident queries out of the loop, where no registers are left for them:
about 70 of them are read back in each step, beside its 64 wgmmas. dq spills on JAX 0.12 only."""

SHAPES = [
    {"head_dim": d, "block_m": m, "block_n": n, "is_causal": c, "dtype": t}
    for d, m, n, c, t in itertools.product(
        (128, 64), (128, 64), (64, 32, 128), (False, True), ("bfloat16", "float16")
    )
]


@dataclasses.dataclass
class Report:
    """What ptxas said of one kernel."""

    name: str
    registers: int
    spilled: int
    shared_memory: int
    wgmmas: int
    serialised: bool

    def faults(self) -> list[str]:
        faults = []
        if self.spilled > SPILLED_BYTES[self.name]:
            faults.append(f"{self.spilled} bytes spilled")
        if self.serialised:
            faults.append("wgmma serialised")
        if not self.wgmmas and self.name != "coarse_sums":
            faults.append("no wgmma")
        if self.shared_memory > SHARED_MEMORY:
            faults.append(f"{self.shared_memory} bytes of shared memory")
        return faults


def compile_kernels(
    *, head_dim, block_m, block_n, is_causal, dtype, config: Config | None = None
) -> list[Report]:
    """Reports of the kernels of one configuration."""
    for old in DUMP.iterdir():
        old.unlink()
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=TARGET.read_text(), topology="1x1x1"
    )
    place = jax.sharding.SingleDeviceSharding(topology.devices[0])

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    length = 8000
    q, k = array(1, 4, length, head_dim), array(1, 2, length, head_dim)
    levels = array(1, 4, -(-length // block_m), -(-length // block_n), dtype=jnp.int32)
    options = {"block_m": block_m, "block_n": block_n, "scale": 0.1, "is_causal": is_causal}

    @jax.jit
    def both(q, k, levels):
        out, lse = mosaic.forward(q, k, k, levels, config=config, **options)
        gradients = mosaic.backward(out, lse, q, k, k, levels, out, lse, config=config, **options)
        return out, gradients

    both.lower(q, k, levels).compile()
    reports = [read_report(path) for path in sorted(DUMP.glob("*.ptxas"))]
    # JAX 0.12 does not compile again what a configuration has in common with one before it.
    names = sorted(r.name for r in reports)
    assert "forward" in names if config else names == sorted(SPILLED_BYTES), reports
    return reports


def read_report(path: Path) -> Report:
    said = path.read_text()
    ptx = path.with_suffix(".ptx").read_text()
    name = re.match(r"(\w+?)_\d+\.ptxas", path.name)[1]
    # JAX 0.12 numbers the files of one kernel apart; there is one kernel of each name.
    (resources,) = path.parent.glob(f"{name}_*.resources.txt")
    resources = resources.read_text()
    return Report(
        name=name,
        registers=int(re.search(r"Used (\d+) registers", said)[1]),
        spilled=int(re.search(r"(\d+) bytes spill stores", said)[1]),
        shared_memory=int(re.search(r"smem_scratch_bytes=(\d+)", resources)[1]),
        wgmmas=ptx.count("wgmma.mma_async"),
        serialised=bool(re.search(r"C75\d\d|serializ", said)),
    )


def starved() -> Config:
    """A configuration whose forward consumers have too few registers."""
    config = default_config(128, 128)
    return dataclasses.replace(
        config, forward=dataclasses.replace(config.forward, multiply_registers=152)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every shape, not a sample")
    shapes = SHAPES if parser.parse_args().all else SHAPES[::7]
    failed = False
    for shape in shapes:
        for report in compile_kernels(**shape):
            faults = report.faults()
            failed |= bool(faults)
            print(*shape.values(), dataclasses.asdict(report), faults or "ok", flush=True)
    reports = compile_kernels(**SHAPES[0], config=starved())
    caught = any(r.faults() for r in reports if r.name == "forward")
    print("negative control", "caught" if caught else "MISSED")
    return int(failed or not caught)


if __name__ == "__main__":
    sys.exit(main())
