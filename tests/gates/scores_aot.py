"""Compile the scores kernel to machine code for an H200 without a GPU, and read ptxas' report.

    python tests/gates/scores_aot.py [--all]

Needs what `mosaic_aot.py` needs, and fails a kernel for the same reasons. At the end a
configuration that must spill is compiled, to see that the gate can fail.
"""

import argparse
import dataclasses
import itertools
import sys

import mosaic_aot  # sets up the dump, so it comes before jax

# isort: split
import jax
from jax.experimental import topologies

from psa_jax.kernels.scores import peak_scores
from psa_jax.kernels.scores.tiles import PeakConfig
from shared_specs.config import PSAConfig

mosaic_aot.SPILLED_BYTES["peaks"] = 0

SHAPES = [
    {"head_dim": d, "causal": c, **rows}
    for d, c, rows in itertools.product(
        (128, 64),
        (False, True),
        (
            {"importance_pool": 4},
            {"importance_pool": 8, "block_n": 32, "tile_n": 8},
            {"importance": "sampled", "sample_n": 5},
        ),
    )
]
STARVED = PeakConfig(multiply_registers=152)
"""Too few registers for the two products and the maximum of a pair."""


def compile_scores(*, head_dim, sizes: PeakConfig | None = None, **fields) -> mosaic_aot.Report:
    """Report of one configuration's kernel."""
    for old in mosaic_aot.DUMP.iterdir():
        old.unlink()
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=mosaic_aot.TARGET.read_text(), topology="1x1x1"
    )
    place = jax.sharding.SingleDeviceSharding(topology.devices[0])
    q, k = (
        jax.ShapeDtypeStruct((1, h, 8000, head_dim), "bfloat16", sharding=place) for h in (4, 2)
    )
    config = PSAConfig(**fields)

    @jax.jit
    def scores(q, k):
        return peak_scores(q, k, config=config, sizes=sizes)

    scores.lower(q, k).compile()
    (path,) = mosaic_aot.DUMP.glob("*.ptxas")
    return mosaic_aot.read_report(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every shape, not a sample")
    failed = False
    for shape in SHAPES if parser.parse_args().all else SHAPES[::5]:
        report = compile_scores(**shape)
        faults = report.faults()
        failed |= bool(faults)
        print(*shape.values(), dataclasses.asdict(report), faults or "ok", flush=True)
    caught = bool(compile_scores(**SHAPES[0], sizes=STARVED).faults())
    print("negative control", "caught" if caught else "MISSED")
    return int(failed or not caught)


if __name__ == "__main__":
    sys.exit(main())
