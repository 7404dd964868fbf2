"""Compile the kernels around attention as they would be launched, without a GPU, and judge them.

The launching functions run on tensors without storage, and what they would launch is recorded:
so what is compiled here is what ships, tile sizes included.

    python tests/gates/kernels_gate.py [--all]

Exit status 1 if a kernel breaks its budget, or if the negative control does not.
"""

import argparse
import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).parent)]

import machine_code  # noqa: E402  (first: it turns the interpreter off)
import torch  # noqa: E402

from psa_torch.attention.rest import kernels as rest  # noqa: E402
from psa_torch.attention.rest import mean_kernel  # noqa: E402
from psa_torch.attention.rest.means import Call  # noqa: E402
from psa_torch.kernels import (  # noqa: E402
    budget,
    defect,
    kmeans,
    label_sort,
    move,
    pyramid,
    scores,
    select,
    similarity,
    table,
)
from psa_torch.kernels._launch import padded_head_dim  # noqa: E402
from psa_torch.kernels.scores import antidiagonal, means, peaks, tiles  # noqa: E402
from psa_torch.kernels.scores.hopper import kernel as hopper  # noqa: E402
from psa_torch.kernels.scores.tiles import HOPPER_PEAK, ScoreConfig  # noqa: E402
from shared_specs import PSAConfig  # noqa: E402

REGISTERS = 65_536
SHARED_MEMORY = {80: 167_936, 90: 233_472, 100: 233_472}
"""Per multiprocessor, in registers and bytes; every program takes 1 KB for itself."""

KERNELS = [
    (pyramid, "_pyramid_kernel"),
    (means, "_pool_kernel"),
    (peaks, "_peak_kernel"),
    (hopper, "peak_kernel_hopper"),
    (antidiagonal, "_antidiagonal_kernel"),
    (select, "_select_kernel"),
    (table, "_table_kernel"),
    (similarity, "_cap_kernel"),
    (move, "_move_kernel"),
    (label_sort, "_count_kernel"),
    (label_sort, "_scan_kernel"),
    (label_sort, "_place_kernel"),
    (kmeans, "_nearest_kernel"),
    (kmeans, "_mean_kernel"),
    (defect, "lost_masses"),
    (defect, "mean_squares"),
    (budget, "largest_of_rows"),
    (budget, "count_changes"),
    (budget, "levels_by_head"),
    (budget, "levels_by_row"),
    (mean_kernel, "mean_of_block"),
    (rest, "rest_forward"),
    (rest, "rest_query_gradient"),
    (rest, "rest_key_gradient"),
]
BUDGET = PSAConfig(mask_mode="budget", importance="defect", rest="mean")
BUDGET_BY_ROW = PSAConfig(mask_mode="budget", importance="defect", causal=True, budget_scope="row")
CAUSAL = PSAConfig(causal=True, sink_blocks=1, text_length=100)
SAMPLED = PSAConfig(importance="sampled")
ANTIDIAGONAL = PSAConfig(importance="antidiagonal", causal=True)
THRESHOLD = PSAConfig(mask_mode="thresholdbound", causal=True, sink_blocks=1, text_length=100)
LONG = 75_600


@dataclass
class Case:
    """One launch and what it may cost.

    Attributes:
        name: what is launched.
        launch: runs the launching function; the last kernel it launches is judged.
        kernel: name of the kernel that is judged instead, if another one is launched after it.
        arch: `sm_` number.
        loop: instructions allowed in the longest loop on tensor cores, or 0 without one.
        spills: bytes allowed.
        per_processor: programs of which registers and shared memory must hold this many at once.
        always: part of the short run.
    """

    name: str
    launch: object
    arch: int = 90
    loop: int = 0
    spills: int = 0
    per_processor: int = 1
    always: bool = False
    kernel: str = ""


def tensor(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def tokens(head_dim=128, dtype=torch.bfloat16, length=LONG, heads=24):
    return tensor(1, heads, length, head_dim, dtype=dtype)


def score(config, head_dim=128, dtype=torch.bfloat16):
    x = tokens(head_dim, dtype)
    return lambda: scores.block_scores(x, x, config)


def score_hopper(config, head_dim=128):
    """The warp-specialised kernel, which tensors without a device would not get."""

    def launch():
        with mock.patch.object(peaks, "peak_tile", lambda *_: HOPPER_PEAK[head_dim]):
            score(config, head_dim)()

    return launch


def selection(config, kv_blocks=1_182):
    kv_len = kv_blocks * config.block_n
    x = tensor(1, 24, 1, kv_blocks, dtype=torch.float32)
    return lambda: select.select_levels(x, config, q_len=100, kv_len=kv_len)


def plan(transposed, kv_blocks=1_182):
    x = tensor(1, 24, 591, kv_blocks, dtype=torch.int32)
    sizes = {"q_len": LONG, "kv_len": kv_blocks * 64, "block_m": 128, "block_n": 64}
    return lambda: table.build_plan(x, is_causal=True, transposed=transposed, **sizes)


def order_of(heads=24):
    return tensor(1, heads, LONG, dtype=torch.int32)


def moves(head_dim=128, dtype=torch.bfloat16):
    x = tokens(head_dim, dtype)
    return lambda: move.move(x, x, x, order_of(), order_of(2))


def label_order(count=1000):
    return lambda: label_sort.sort_by_label(order_of(), count, tensor(LONG, dtype=torch.int32))


def nearest(head_dim=128, dtype=torch.bfloat16):
    width = padded_head_dim(head_dim)
    columns = kmeans.Columns(
        tensor(1, 24, 1024, width, dtype=torch.float16), tensor(1, 24, 1024, dtype=torch.float32)
    )
    scale, centre = (tensor(1, 24, *x, dtype=torch.float32) for x in ((), (head_dim,)))
    return lambda: kmeans.nearest(tokens(head_dim, dtype), columns, scale, centre)


def cluster_means(head_dim=128, dtype=torch.bfloat16):
    x, scale = tokens(head_dim, dtype), tensor(1, 24, dtype=torch.float32)
    start = tensor(1, 24, 1000, head_dim, dtype=torch.float32)
    bins = tensor(1, 24, 1024, dtype=torch.int32)
    by_label = label_sort.Sorted(order_of(), order_of(), bins, bins)
    return lambda: kmeans.move_centroids(x, start, by_label, scale, start[:, :, 0])


def defects(causal=False, head_dim=128, dtype=torch.bfloat16, length=32_768):
    settings = {"block_m": 128, "block_n": 64, "sample_m": 8, "scale": 0.1}
    x = tokens(head_dim, dtype, length)
    return lambda: defect.defect_scores(x, x, **settings, causal=causal, rest_mean=True)


def budgeted(config):
    x = tensor(1, 24, 256, 512, 4, dtype=torch.float32)
    return lambda: budget.budget_levels(x, config, q_len=32_768, kv_len=32_768)


def means_of_rest(head_dim=128, dtype=torch.bfloat16, causal=False):
    """Forward, then both kernels of the gradients."""
    x, blocks = tokens(head_dim, dtype, 32_768), tensor(1, 24, 512, head_dim, dtype=dtype)
    levels = tensor(1, 24, 256, 512, dtype=torch.int32)
    lse = tensor(1, 24, 32_768, dtype=torch.float32)
    call = Call(32_768, 32_768, 128, 64, causal, 0.1)

    def launch():
        mean_kernel.means_of_blocks(x, x, 64)
        rest.add_means(x, blocks, blocks, levels, x, lse, call)
        rest.add_gradients(x, lse, x, blocks, blocks, levels, x, lse, x, call)

    return launch


def both(x, function):
    return lambda: function(x, x, 64)


def cases():
    half, single = torch.float16, torch.float32
    yield Case("pooled", score(PSAConfig()), loop=250, per_processor=2, always=True)
    yield Case("pooled causal", score(CAUSAL), loop=400, always=True)
    yield Case("sampled", score(SAMPLED), loop=210, per_processor=2, always=True)
    yield Case("antidiagonal causal", score(ANTIDIAGONAL), loop=245, always=True)
    yield Case("topk", selection(CAUSAL), always=True)
    yield Case("thresholdbound", selection(THRESHOLD), always=True)
    yield Case("plan", plan(False), always=True)
    yield Case("plan transposed", plan(True), always=True)
    yield Case("pyramid", both(tokens(), pyramid.build_pyramid), per_processor=4, always=True)
    yield Case("pool", lambda: means.pool_blocks(tokens(), 128, 4), per_processor=4, always=True)
    yield Case(
        "similarity",
        lambda: similarity.similarity_cap(tokens(), PSAConfig()),
        per_processor=4,
        always=True,
    )
    yield Case("moves", moves(), per_processor=8, always=True)
    yield Case("sort by label", label_order(), per_processor=8, always=True)
    # Two programs: the products of one beside the choice of the other.
    yield Case("nearest centroid", nearest(), loop=270, per_processor=2, always=True)
    yield Case("means of clusters", cluster_means(), per_processor=6, always=True)
    # Two programs of the first pass: the exponentials of one beside the products of the other.
    # Where rows are no multiple of 16 their addresses leave room for one.
    lost = {"kernel": "lost_masses", "loop": 1400}
    yield Case("defects", defects(), per_processor=2, always=True, **lost)
    yield Case("defects 75,600", defects(length=LONG), **lost)
    yield Case("defects causal", defects(True), kernel="lost_masses", loop=1800)
    yield Case("defects D=64", defects(False, 64, torch.float16), per_processor=2, **lost)
    yield Case("squares of defects", defects(), per_processor=4, always=True)
    for name, spills in (("largest_of_rows", 0), ("count_changes", 80), ("levels_by_head", 16)):
        yield Case(f"budget {name}", budgeted(BUDGET), kernel=name, spills=spills, always=True)
    yield Case("budget of a row", budgeted(BUDGET_BY_ROW), always=True)
    for name in ("mean_of_block", "rest_forward", "rest_query_gradient"):
        yield Case(f"rest {name}", means_of_rest(), kernel=name, always=True)
    # Its accumulators and logits are more than the registers hold.
    yield Case("rest keys", means_of_rest(), spills=900, always=True)
    for name in ("rest_forward", "rest_query_gradient"):
        yield Case(f"{name} causal", means_of_rest(causal=True), kernel=name)
        yield Case(f"{name} D=256", means_of_rest(256), kernel=name, spills=100)
    for head_dim in (64, 96, 256):
        yield Case(f"nearest D={head_dim}", nearest(head_dim, torch.float16), loop=400)
    yield Case("moves of hidden states", moves(5120))
    yield Case("moves float32", moves(64, torch.float32))
    # 16 warps hold 8,192 blocks with 128 registers each; what spills is outside the loops.
    yield Case("thresholdbound 8,192", selection(THRESHOLD, 8_192), spills=400)
    # Eight columns a block are few enough for the compiler to unroll their loop.
    for pooled, loop in ((2, 280), (8, 1400)):
        yield Case(f"pooled by {pooled}", score(PSAConfig(importance_pool=pooled)), loop=loop)
    for block_n, loop in ((32, 1400), (128, 300)):
        yield Case(f"pooled {block_n}", score(PSAConfig(block_n=block_n)), loop=loop)
    yield Case("pooled float16 D=64", score(PSAConfig(), 64, half), loop=250)
    yield Case("pooled D=96", score(PSAConfig(), 96), loop=300, per_processor=2)
    yield Case("pooled D=256", score(PSAConfig(), 256), loop=320)
    yield Case("pooled float32", score(PSAConfig(), 128, single))
    yield Case("pooled float32 causal", score(CAUSAL, 128, single), spills=64)
    yield Case("sampled causal", score(PSAConfig(importance="sampled", causal=True)), loop=780)
    # What the antidiagonal kernel spills is outside the loop of products.
    yield Case("antidiagonal D=64", score(ANTIDIAGONAL, 64), loop=245, spills=400)
    yield Case("antidiagonal float32", score(ANTIDIAGONAL, 128, single), spills=64)
    yield Case("pyramid float32", both(tokens(64, single), pyramid.build_pyramid))
    # What the warp-specialised kernel spills, most with Triton 3.9, is outside the loop of
    # products, but for the columns on the diagonal, whose products and masks share a loop with
    # the others.
    case = "warp-specialised pooled"
    yield Case(case, score_hopper(PSAConfig()), loop=260, spills=220, always=True)
    yield Case("warp-specialised causal", score_hopper(CAUSAL), loop=650, spills=1300)
    yield Case("warp-specialised sampled", score_hopper(SAMPLED), loop=260, spills=1100)
    yield Case("warp-specialised D=64", score_hopper(PSAConfig(), 64), loop=260, spills=210)
    for arch in (80, 100):
        yield Case("pooled", score(PSAConfig()), arch=arch, loop=400, spills=32)
        yield Case("pooled causal", score(CAUSAL), arch=arch, loop=900)
        yield Case("antidiagonal causal", score(ANTIDIAGONAL), arch=arch, loop=300, spills=400)
        yield Case("thresholdbound", selection(THRESHOLD), arch=arch)
        yield Case("pyramid", both(tokens(), pyramid.build_pyramid), arch=arch)
        yield Case("nearest centroid", nearest(), arch=arch, loop=600)


class Recorder:
    """Stands in for a kernel and keeps the arguments of its last launch."""

    def __init__(self, kernel, launches: list):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((self.kernel, args, options))


def record(launch, arch: int, wanted: str = "") -> tuple:
    """(kernel, positional arguments, keyword arguments) of the last launch on `sm_<arch>`, of the
    kernel `wanted` if one is named."""
    launches = []
    with contextlib.ExitStack() as stack:
        for module, name in KERNELS:
            recorder = Recorder(getattr(module, name), launches)
            stack.enter_context(mock.patch.object(module, name, recorder))
        for module in (tiles, antidiagonal):
            stack.enter_context(mock.patch.object(module, "capability", lambda _: divmod(arch, 10)))
        launch()
    return [x for x in launches if wanted in ("", x[0].__name__)][-1]


def breaches(case: Case, code: machine_code.MachineCode) -> list[str]:
    found = [f"warning: {x}" for x in code.warnings]
    if code.spill_bytes > case.spills:
        found.append(f"spills {code.spill_bytes} B, allowed {case.spills}")
    registers = code.registers * code.warps * 32 * case.per_processor
    if registers > REGISTERS:
        found.append(f"{case.per_processor} programs need {registers} registers")
    shared = (code.shared_bytes + 1024) * case.per_processor
    if shared > SHARED_MEMORY[case.arch]:
        found.append(f"{case.per_processor} programs need {shared} B of shared memory")
    loops = code.tensor_loops()
    if case.loop and case.arch < 100:
        longest = max((x.size for x in loops), default=0)
        if not 0 < longest <= case.loop:
            found.append(f"longest tensor loop has {longest} instructions, allowed {case.loop}")
        if case.arch == 90 and any(x.opcodes["HMMA"] for x in loops):
            found.append("a loop multiplies by HMMA instead of wgmma")
    return found


def judge(case: Case) -> list[str]:
    code = machine_code.compile_launch(*record(case.launch, case.arch, case.kernel), case.arch)
    found = breaches(case, code)
    print(
        f"{'FAIL' if found else 'ok  '} sm_{case.arch} {case.name}: {code.registers} registers, "
        f"{code.spill_bytes} B spilled, {code.shared_bytes} B shared, "
        f"loops {[x.size for x in code.loops]} {'; '.join(found)}",
        flush=True,
    )
    return found


def negative_control_fails() -> bool:
    """A tile twice too wide for its warps must be found out."""
    wide = ScoreConfig(rows=128, columns=256, warps=4, stages=2, per_processor=1)
    with mock.patch.object(tiles, "choose_peak", lambda *_: wide):
        case = Case("negative control", score(PSAConfig()), loop=10_000)
        return bool(judge(case))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every configuration and architecture")
    options = parser.parse_args()
    failed = [case for case in cases() if (case.always or options.all) and judge(case)]
    caught = negative_control_fails()
    print(f"{len(failed)} kernels over budget; negative control {'' if caught else 'not '}caught")
    return 1 if failed or not caught else 0


if __name__ == "__main__":
    sys.exit(main())
