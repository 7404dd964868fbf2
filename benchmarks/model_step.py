"""One denoising step of a video transformer: dense, and with PSA in it, at published sizes.

    python -m benchmarks.model_step --device cuda --output step.jsonl

The geometry is the model's, the weights are random: made on `meta`, filled on the device, so no
checkpoint is needed and no network. Random weights attend almost evenly. So the density is set by
top-k (about 15 %) and says nothing of quality, and a threshold would keep far more than on a video.
Every model is first checked: with all blocks at level 1 its attention is the dense one.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from benchmarks.machine import describe
from benchmarks.measure import host_seconds
from benchmarks.step_models import MODELS, Geometry, build, first_attention, inputs
from psa_torch.integrations.diffusers import Applied, apply
from shared_specs.config import PSAConfig
from shared_specs.geometry import cdiv
from shared_specs.order import gilbert_order

TOLERANCE = 1e-2
"""Relative error of level 1 in bfloat16, or twice that between two dense kernels if it is more."""

CONFIG = PSAConfig(rearrange_method="Gilbert")
LEVEL_ONE = dataclasses.replace(CONFIG, mask_ratios={1: (0.0, 1.0)})


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to attend.

    Attributes:
        cudnn: dense attention, also that beside PSA, is cuDNN's; otherwise PyTorch's choice.
        config: of PSA in the self-attention; None where that is dense too.
        order, refresh_every: as in `apply`.
        compiled: every block by itself; there is no way back, so these rows come last.
    """

    cudnn: bool
    config: PSAConfig | None = None
    order: str = "model"
    refresh_every: int = 1
    compiled: bool = False


ROWS = {
    "dense-default": Row(False),
    "dense-cudnn": Row(True),
    "psa-topk15-gilbert-once-a-model": Row(True, CONFIG),
    "psa-topk15-gilbert-in-every-layer": Row(True, CONFIG, "layer"),
    "psa-topk15-no-order": Row(True, dataclasses.replace(CONFIG, rearrange_method=None)),
    "psa-topk15-gilbert-refresh-4": Row(True, CONFIG, refresh_every=4),
    "compiled-dense-cudnn": Row(True, compiled=True),
    "compiled-psa-topk15-gilbert": Row(True, CONFIG, compiled=True),
}


class _TimedDense(TorchFunctionMode):
    """Times the self-attention of a dense model: calls with as many keys as queries."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            query, key = args[:2] if args else (kwargs["query"], kwargs["key"])
            if query.shape[2] == key.shape[2]:
                return self.clock.timed(func, *args, **kwargs)
        return func(*args, **kwargs)


class Clock:
    """Times spans on a device, or on the host where that is the device."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.spans: list[tuple[Any, Any]] = []

    def timed(self, call: Callable, *args, **kwargs) -> Any:
        start = self._now()
        result = call(*args, **kwargs)
        self.spans.append((start, self._now()))
        return result

    def milliseconds(self) -> list[float]:
        """Of every span so far."""
        if not self.cuda:
            return [1e3 * (end - start) for start, end in self.spans]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in self.spans]

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@contextlib.contextmanager
def attending(model: nn.Module, row: Row, record: bool = False) -> Iterator[Applied | None]:
    """The model attends as `row` says; yields the handle of PSA, or None."""
    with contextlib.ExitStack() as stack:
        if row.cudnn:
            stack.enter_context(sdpa_kernel(SDPBackend.CUDNN_ATTENTION))
        if row.config is None:
            yield None
            return
        about = {"order": row.order, "refresh_every": row.refresh_every, "record": record}
        psa = stack.enter_context(apply(model, config=row.config, **about))
        psa.step = 0
        yield psa


def attention_ms(step: Callable[[], Tensor], psa: Applied | None, device: str) -> float:
    """Time of all self-attention in one step, from q, k and v to the output."""
    clock = Clock(device)
    if psa is None:
        with _TimedDense(clock):
            step()
        return sum(clock.milliseconds())
    for layer in psa.layers:
        layer.attend = functools.partial(clock.timed, layer.attend)
    step()
    for layer in psa.layers:
        del layer.attend
    return sum(clock.milliseconds())


def measure(model: nn.Module, arguments: dict, row: Row, device: str, repeats: int) -> dict:
    """One row: times, memory, density; of the self-attention only where nothing is compiled.

    Args:
        model, arguments: of a step.
        row: how it attends.
        device: 'cpu' or 'cuda'.
        repeats: timed steps; more if a row keeps its choice for more.
    """
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    about: dict[str, Any] = {}

    def stepping(psa: Applied | None) -> Callable[[], Tensor]:
        def step() -> Tensor:
            if psa is not None:
                psa.step += 1
            return model(**arguments)[0]

        return step

    if row.config is not None and not row.compiled:
        with attending(model, row, record=True) as psa:
            stepping(psa)()
            about["density"] = statistics.fmean(record.density for record in psa.records.read())
    with attending(model, row) as psa:
        step = stepping(psa)
        step()
        wait()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        clock = Clock(device)
        # Whole rounds of choosing and keeping, and their mean: the median would be of keeping.
        for _ in range(cdiv(repeats, row.refresh_every) * row.refresh_every):
            clock.timed(step)
        about["step_ms"] = clock.milliseconds()
        if device == "cuda":
            about["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if not row.compiled and row.refresh_every == 1:
            about["attention_ms"] = attention_ms(step, psa, device)
        about["host_ms"] = 1e3 * host_seconds(step, lambda _: wait(), 1)[0]
    middle = statistics.median if row.refresh_every == 1 else statistics.fmean
    about["middle_step_ms"] = middle(about["step_ms"])
    return about


def check(model: nn.Module, arguments: dict, geometry: Geometry, device: str) -> dict[str, float]:
    """Errors of the first self-attention to the dense default: of level 1, and of cuDNN's.

    Of the attention, not of the step: to that, flat attention adds too little to show a mistake.

    Raises:
        ValueError: level 1 is not the dense attention.
    """
    seen = []

    def look(module, args, output) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).float())

    rows = {"level 1": Row(False, LEVEL_ONE)}
    if device == "cuda":
        rows["cudnn"] = Row(True)
    hook = first_attention(model).register_forward_hook(look)
    try:
        for row in (Row(False), *rows.values()):
            with attending(model, row):
                model(**arguments)
    finally:
        hook.remove()
    dense, ordered, *others = seen
    # With the order once a model, attention sees its tokens in order.
    order = torch.from_numpy(gilbert_order(geometry.grid).astype("int64")).to(dense.device)
    found = [_relative(ordered, dense[:, order]), *(_relative(out, dense) for out in others)]
    errors = dict(zip(rows, found, strict=True))
    allowed = max(TOLERANCE, 2 * errors.get("cudnn", 0))
    if not errors["level 1"] <= allowed:
        raise ValueError(
            f"level 1 differs from dense attention by {errors['level 1']:.2e}, over {allowed:.2e}"
        )
    return errors


def _relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def run(
    names: list[str],
    device: str,
    *,
    rows: list[str],
    repeats: int,
    layers: int | None,
    compiler: str = "inductor",
) -> Iterator[dict[str, Any]]:
    """Rows of the models named, each after its model was checked.

    Args:
        names: keys of `MODELS`.
        device: 'cpu' or 'cuda'.
        rows: keys of `ROWS`.
        repeats: timed steps.
        layers: only the first so many of each model; None: all.
        compiler: backend of the compiled rows.
    """
    rows = sorted(rows, key=lambda row: ROWS[row].compiled)
    for name in names:
        geometry = MODELS[name]
        if layers is not None:
            geometry = dataclasses.replace(geometry, layers=min(layers, geometry.layers))
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        model = build(geometry, device, dtype)
        arguments = inputs(geometry, device, dtype)
        size = {
            "benchmark": "model-step",
            "model": name,
            **dataclasses.asdict(geometry),
            "tokens": geometry.tokens,
            "parameters": sum(math.prod(p.shape) for p in model.parameters()),
            "dtype": str(dtype).removeprefix("torch."),
            "machine": describe("gpu" if device == "cuda" else "cpu"),
        }
        with torch.inference_mode():
            errors = check(model, arguments, geometry, device)
            compiled = False
            for row in rows:
                chosen = ROWS[row]
                if chosen.compiled and not compiled:
                    for block in (m for m in model.modules() if hasattr(m, "attn1")):
                        block.compile(backend=compiler)
                    compiled = True
                if device == "cpu":
                    chosen = dataclasses.replace(chosen, cudnn=False)
                found = measure(model, arguments, chosen, device, repeats)
                yield {**size, "provider": row, "errors": errors, **found}
        del model, arguments
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def line(row: dict[str, Any], base: float) -> str:
    """A row in words; `base` is the time of the step that it is compared with."""
    step = row["middle_step_ms"]
    parts = [f"  {row['provider']:34s} step {step:9.1f} ms {base / step:5.2f}x"]
    if "attention_ms" in row:
        parts.append(f"attention {row['attention_ms']:9.1f} ms {row['attention_ms'] / step:4.0%}")
    parts.append(f"host {row['host_ms']:7.1f} ms")
    if "density" in row:
        parts.append(f"density {row['density']:.1%}")
    if "peak_gib" in row:
        parts.append(f"peak {row['peak_gib']:.1f} GiB")
    return "  ".join(parts)


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, print a line a row and store the rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model_step", description=__doc__)
    published = [name for name in MODELS if not name.startswith("tiny")]
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=published)
    parser.add_argument("--row", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, help="only so many layers of each model")
    parser.add_argument("--compiler", default="inductor", help="of the compiled rows")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines are appended")
    args = parser.parse_args(argv)
    for name in ("repeats", "layers"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    first: dict[str, float] = {}
    with args.output.open("a", encoding="utf-8") as file:
        for row in run(
            args.model,
            args.device,
            rows=args.row,
            repeats=args.repeats,
            layers=args.layers,
            compiler=args.compiler,
        ):
            file.write(json.dumps(row) + "\n")
            file.flush()
            if row["model"] not in first:
                errors = ", ".join(f"{key} {value:.1e}" for key, value in row["errors"].items())
                print(f"\n{row['model']}, {row['layers']} layers, {row['tokens']} tokens: {errors}")
            base = first.setdefault(row["model"], row["middle_step_ms"])
            print(line(row, base), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
