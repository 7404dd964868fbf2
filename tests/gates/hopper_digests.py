"""Print a hash of the machine code of every warp-specialised kernel, compiled without a GPU.

A rewrite that is to change nothing gives the same lines before and after:

    python tests/gates/hopper_digests.py > before.txt
    ... edit ...
    python tests/gates/hopper_digests.py | diff before.txt -

Lines of different versions of Triton cannot be compared. Places of the source are left out of what
is compiled: by them alone the compiler puts a few instructions in another order.
"""

import argparse
import itertools
import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).parent)]

import machine_code  # noqa: E402  (first: it turns the interpreter off)
from attention_gate import Case, launches  # noqa: E402
from kernels_gate import record, score_hopper  # noqa: E402

from psa_torch.attention.triton import configs  # noqa: E402
from shared_specs import PSAConfig  # noqa: E402

ARCH = 90


def programs():
    """(name, kernel, arguments, options) of every launch that is compiled."""
    for head_dim, is_causal in itertools.product((64, 128), (False, True)):
        case = Case("forward", head_dim, is_causal=is_causal)
        for launch in launches(replace(case, config=configs.HOPPER_FORWARD[head_dim])):
            yield f"{head_dim} {is_causal} forward", launch.kernel, launch.args, launch.options
        for query in configs.HOPPER_QUERY_GRADIENT.values():
            config = configs.choose_backward(configs.HOPPER, head_dim, case.dtype, 128, 64)
            # The second order of dq; dk and dv, which do not differ, are compiled once.
            is_shipped = query == configs.HOPPER_QUERY_GRADIENT[head_dim]
            backward = replace(case, direction="backward", config=replace(config, query=query))
            for launch in launches(backward):
                is_query = launch.name == "query_gradient_hopper"
                if is_query or is_shipped and launch.name == "key_gradient_hopper":
                    order = f" beside={query.beside}" if is_query else ""
                    name = f"{head_dim} {is_causal} {launch.label()}{order}"
                    yield name, launch.kernel, launch.args, launch.options
        for importance in ("pooled", "sampled"):
            config = PSAConfig(importance=importance, causal=is_causal)
            kernel = record(score_hopper(config, head_dim), ARCH)
            yield f"{head_dim} {is_causal} scores {importance}", *kernel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--filter", default="", help="only names that hold this text")
    options = parser.parse_args()
    for name, kernel, args, constants in programs():
        if options.filter in name:
            code = machine_code.compile_launch(kernel, args, dict(constants), ARCH)
            print(
                f"{name}: {code.digest} {code.registers} registers, {code.spill_bytes} B spilled, "
                f"{code.shared_bytes} B shared",
                flush=True,
            )


if __name__ == "__main__":
    main()
