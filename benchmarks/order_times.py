"""What a token order costs on a GPU, cold and warm, and what its parts do.

    python -m benchmarks.order_times

A row is one order at one shape: choosing the order, moving q, k and v, and putting an output back,
beside a plain copy of the same four tensors and the whole sparse call without an order. Times are
medians over runs that find nothing in the cache.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe
from shared_specs.config import REARRANGE_METHODS, PSAConfig

SHAPES = {"32k-h24": ((32, 32, 32), 24), "75k-h40": ((21, 45, 80), 40)}
"""Grid and heads by name; D = 128, bfloat16."""

HEAD_DIM = 128
CACHE_BYTES = 256 * 2**20


def milliseconds(call: Callable[[], Any], repeats: int) -> float:
    """Median time of `call()` on the current GPU."""
    cache = torch.empty(CACHE_BYTES, dtype=torch.int8, device="cuda")
    for _ in range(3):
        call()
    events = []
    for _ in range(repeats):
        cache.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def calls(grid: tuple[int, int, int], heads: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is timed at one shape, by name."""
    from psa_torch import psa_attention
    from psa_torch.order import TokenOrder

    length = math.prod(grid)
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, length, HEAD_DIM, generator=generator, device="cuda").bfloat16()
        for _ in range(3)
    )
    yield "copy of q, k, v and the output", lambda: [x.clone() for x in (q, k, v, q)]
    yield "whole call, no order", lambda: psa_attention(q, k, v)
    for method in REARRANGE_METHODS[1:]:
        config = PSAConfig(rearrange_method=method, grid=grid)
        order = TokenOrder.from_config(config, length, length)

        def run(centroids=None, order=order):
            *moved, state = order.apply(q, k, v, centroids=centroids)
            return order.undo(moved[0], state), state

        if order.key_centroids is None:
            yield method, run
            continue
        yield f"{method}, cold", run
        left = run()[1].centroids
        yield f"{method}, warm", lambda run=run, left=left: run(left)
    yield from parts(q, k, v, grid)


def parts(q, k, v, grid) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The kernels that `Clusters` launches."""
    from psa_torch.kernels import kmeans, label_sort, move
    from psa_torch.order import TokenOrder

    config = PSAConfig(rearrange_method="Clusters", grid=grid)
    order = TokenOrder.from_config(config, k.shape[2], k.shape[2])
    state = order.choose(q, k)
    start, curve = state.centroids.keys, order._curve(k)
    scale, centre = kmeans.scales(k), kmeans.mean_token(k, start.shape[2])
    _, columns = kmeans.move_centroids(k, start, None, scale, centre)
    labels = kmeans.nearest(k, columns, scale, centre)
    by_label = label_sort.sort_by_label(labels, start.shape[2])
    yield "part: largest element", lambda: kmeans.scales(k)
    yield "part: nearest centroid, once", lambda: kmeans.nearest(k, columns, scale, centre)
    yield "part: sort by label, once", lambda: label_sort.sort_by_label(labels, start.shape[2])
    yield (
        "part: sort along the curve",
        lambda: label_sort.sort_by_label(labels, start.shape[2], curve),
    )
    yield "part: means, once", lambda: kmeans.move_centroids(k, start, by_label, scale, centre)
    yield "part: q, k and v moved", lambda: move.move(q, k, v, state.queries[0], state.keys[0])
    yield "part: output moved", lambda: move.move_one(q, state.queries[1])


def main() -> None:
    """Time every order at every shape; print a table and write rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("outputs/order-times.jsonl"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA device")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    machine = describe("gpu")
    with args.output.open("w", encoding="utf-8") as file, torch.no_grad():
        for shape in args.shape:
            for name, call in calls(*SHAPES[shape]):
                row = {"shape": shape, "what": name, "ms": milliseconds(call, args.repeats)}
                print(f"{shape:8}  {name:32}  {row['ms']:9.3f} ms", flush=True)
                file.write(json.dumps({**row, "machine": machine}) + "\n")


if __name__ == "__main__":
    main()
