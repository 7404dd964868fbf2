"""One sequence on several GPUs: exchange, whole call and gradients, checked, then timed.

    NCCL_NVLS_ENABLE=0 torchrun --nproc-per-node 4 -m benchmarks.sequence_parallel --output FILE

Every figure is that of the slowest rank, from an idle queue after a barrier, as a model calls it.
Groups of 1, 2, … ranks are made of the first ranks of the job; the others wait.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.machine import describe
from psa_torch import distributed, psa_attention

WORKLOADS = {"h24-32k": (24, 32_768), "h40-75k": (40, 75_600)}
HEAD_DIM = 128


class Case:
    """One workload on the first `world` ranks.

    Args:
        heads, length: of the whole sequence, in bfloat16 with `HEAD_DIM` channels.
        group: those ranks.
    """

    def __init__(self, heads: int, length: int, group: dist.ProcessGroup):
        self.group = group
        self.world, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.lengths = tuple(len(x) for x in torch.arange(length).tensor_split(self.world))
        generator = torch.Generator("cuda").manual_seed(0)
        shape = (1, heads, length, HEAD_DIM)
        # The same on every rank, so that each can compute all of it and compare.
        self.whole = [
            torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator)
            for _ in range(4)
        ]
        self.shards = [x.split(self.lengths, 2)[self.rank].contiguous() for x in self.whole]
        self.plan = distributed.head_plan(1, heads, heads, self.world)

    def exchange(self, attend: Callable[..., Tensor], *shards: Tensor) -> Tensor:
        """`attend` on whole sequences of some heads."""
        rows = self.plan.q_rows, self.lengths, self.group
        whole = (distributed.to_heads(x, *rows) for x in shards)
        return distributed.to_sequence(attend(*whole), 1, *rows)

    def calls(self) -> dict[str, Callable[[], Any]]:
        """Name to a forward call on this rank's tokens."""
        q, k, v = self.shards[:3]
        sparse = functools.partial(distributed.psa_attention, group=self.group)
        if self.world == 1:
            return {
                "psa": functools.partial(psa_attention, q, k, v),
                "dense": functools.partial(_cudnn, q, k, v),
            }
        route = self.plan.q_rows, self.lengths, self.group
        heads = [distributed.to_heads(x, *route) for x in (q, k, v)]
        return {
            "all-to-all of one array": functools.partial(distributed.to_heads, q, *route),
            "exchange alone": functools.partial(self.exchange, lambda q, k, v: q, q, k, v),
            "psa, own heads": functools.partial(psa_attention, *heads),
            "psa": functools.partial(sparse, q, k, v),
            "dense": functools.partial(self.exchange, _cudnn, q, k, v),
        }

    def backward(self) -> dict[str, Callable[[], Any]]:
        """Name to a forward and backward call."""
        leaves = [x.clone().requires_grad_() for x in self.shards[:3]]
        sparse = functools.partial(distributed.psa_attention, group=self.group)
        attends = {"psa": sparse, "dense": functools.partial(self.exchange, _cudnn)}

        def both(attend):
            return torch.autograd.grad(attend(*leaves), leaves, self.shards[3])

        return {name: functools.partial(both, attend) for name, attend in attends.items()}

    def check(self) -> dict[str, Any]:
        """How the result of the ranks compares with that of one."""
        whole = [x.clone().requires_grad_() for x in self.whole[:3]]
        out, levels = psa_attention(*whole, return_levels=True)
        want = torch.autograd.grad(out, whole, self.whole[3])
        mine = [x.clone().requires_grad_() for x in self.shards[:3]]
        got, own = distributed.psa_attention(*mine, group=self.group, return_levels=True)
        grads = torch.autograd.grad(got, mine, self.shards[3])
        rows = self.plan.q_rows[self.rank]
        pairs = zip(("out", "dq", "dk", "dv"), (got, *grads), (out, *want), strict=True)
        errors = {}
        for name, x, full in pairs:
            y = full.detach().split(self.lengths, 2)[self.rank].float()
            errors[name] = ((x.detach().float() - y).norm() / y.norm()).item()
        equal = torch.equal(own[0], levels[0, rows.start : rows.stop])
        return {"levels_equal": equal, "relative_difference": errors}


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(q, k, v)


def _times(call: Callable[[], Any], group: dist.ProcessGroup, repeats: int) -> list[float]:
    """Milliseconds of each call, of the slowest rank."""
    for _ in range(2):
        call()
    found = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        dist.barrier(group)
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end))
    slowest = torch.tensor(found, device="cuda")
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
    return sorted(slowest.tolist())


def _rows(case: Case, name: str, repeats: int) -> list[dict[str, Any]]:
    about = {"workload": name, "world": case.world, "machine": describe("gpu")}
    if case.world > 1:
        about |= case.check()
        torch.cuda.empty_cache()
    rows = []
    with torch.no_grad():
        rows += [
            {"call": what, "pass": "forward", "ms": _times(call, case.group, repeats)}
            for what, call in case.calls().items()
        ]
    rows += [
        {"call": what, "pass": "forward+backward", "ms": _times(call, case.group, repeats)}
        for what, call in case.backward().items()
    ]
    return [about | row | {"ms_median": statistics.median(row["ms"])} for row in rows]


def _report(rows: list[dict[str, Any]], output: Path) -> None:
    with output.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    for row in rows:
        span = f"{row['ms_median']:9.3f} ms ({row['ms'][0]:.3f}-{row['ms'][-1]:.3f})"
        label = f"{row['workload']} P={row['world']} {row['call']:<24} {row['pass']:<17}"
        print(label, span, flush=True)
    if "levels_equal" in rows[0]:
        print(rows[0]["levels_equal"], rows[0]["relative_difference"], flush=True)


def main() -> None:
    """Parse the command line, run, and write the rows of rank 0."""
    parser = argparse.ArgumentParser(prog="torchrun -m benchmarks.sequence_parallel")
    parser.add_argument("--output", type=Path, required=True, help="file the rows are appended to")
    parser.add_argument("--repeats", type=int, default=12, help="timed calls (default 12)")
    args = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl", device_id=torch.device("cuda", int(os.environ["LOCAL_RANK"])))
    world, rank = dist.get_world_size(), dist.get_rank()
    sizes = [size for size in (1, 2, 4, 8) if size <= world]
    groups = {size: dist.new_group(list(range(size))) for size in sizes}
    for name, (heads, length) in WORKLOADS.items():
        for size in sizes:
            if rank < size:
                found = _rows(Case(heads, length, groups[size]), name, args.repeats)
                torch.cuda.empty_cache()
                if rank == 0:
                    _report(found, args.output)
            dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
