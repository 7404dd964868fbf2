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
from torch.overrides import TorchFunctionMode

from benchmarks.machine import describe
from benchmarks.measure import host_seconds
from psa_torch.integrations.diffusers import Applied, apply
from shared_specs.config import PSAConfig
from shared_specs.order import gilbert_order

TOLERANCE = 1e-2
"""Relative error of level 1 in bfloat16, or twice that between two dense kernels if it is more."""

FLOAT32 = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")
"""Parameters that diffusers keeps in float32 when it loads a Wan model."""


@dataclasses.dataclass(frozen=True)
class Geometry:
    """A Wan transformer and the latents of one video.

    Attributes:
        heads, head_dim, layers, feed_forward: of the transformer.
        latents: (frames, height, width); a token is one frame of 2 x 2.
        text: tokens of the prompt.
    """

    heads: int
    layers: int
    feed_forward: int
    latents: tuple[int, int, int]
    head_dim: int = 128
    text: int = 512

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens (frames, height, width)."""
        frames, height, width = self.latents
        return frames, height // 2, width // 2

    @property
    def tokens(self) -> int:
        """Their number."""
        return math.prod(self.grid)


MODELS = {
    "wan2.1-1.3b-480p-81f": Geometry(12, 30, 8960, (21, 60, 104)),
    "wan2.1-14b-480p-81f": Geometry(40, 40, 13824, (21, 60, 104)),
    "wan2.1-14b-720p-81f": Geometry(40, 40, 13824, (21, 90, 160)),
    "tiny": Geometry(2, 2, 64, (3, 16, 24), head_dim=32, text=7),
}
CONFIG = PSAConfig(rearrange_method="Gilbert")
LEVEL_ONE = dataclasses.replace(CONFIG, mask_ratios={1: (0.0, 1.0)})


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to attend.

    Attributes:
        backend: diffusers' backend of every dense attention, also of that beside PSA.
        config: of PSA in the self-attention; None where that is dense too.
        order: as in `apply`.
    """

    backend: str
    config: PSAConfig | None = None
    order: str = "model"


DEFAULT, CUDNN = "native", "_native_cudnn"
ROWS = {
    "dense-default": Row(DEFAULT),
    "dense-cudnn": Row(CUDNN),
    "psa-topk15-gilbert-once-a-model": Row(CUDNN, CONFIG),
    "psa-topk15-gilbert-in-every-layer": Row(CUDNN, CONFIG, "layer"),
    "psa-topk15-gilbert-beside-default": Row(DEFAULT, CONFIG),
    "psa-topk15-no-order": Row(CUDNN, dataclasses.replace(CONFIG, rearrange_method=None)),
}


def arguments_of(geometry: Geometry) -> dict[str, Any]:
    """What `WanTransformer3DModel` is made with."""
    return {
        "patch_size": (1, 2, 2),
        "num_attention_heads": geometry.heads,
        "attention_head_dim": geometry.head_dim,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 4096,
        "freq_dim": 256,
        "ffn_dim": geometry.feed_forward,
        "num_layers": geometry.layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
    }


def build(geometry: Geometry, device: str, dtype: torch.dtype) -> nn.Module:
    """The transformer with random weights on `device`."""
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        model = WanTransformer3DModel(**arguments_of(geometry))
    for name, parameter in model.named_parameters():
        kept = any(part in name for part in FLOAT32)
        parameter.data = parameter.data.to(torch.float32 if kept else dtype)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.data.fill_(1.0)
        elif name.endswith("bias"):
            parameter.data.zero_()  # one would hide what little an even attention gives
        else:
            parameter.data.normal_(0.0, 0.02, generator=generator)
    # Rotary tables are computed, not filled: what `meta` made of them has no values.
    model.rope = type(model.rope)(geometry.head_dim, (1, 2, 2), 1024).to(device)
    return model.eval().requires_grad_(False)


def inputs(model: nn.Module, geometry: Geometry, device: str, dtype: torch.dtype) -> tuple:
    """Latents, timestep and prompt of one video."""
    generator = torch.Generator(device).manual_seed(1)
    shape = (1, model.config.in_channels, *geometry.latents)
    text = (1, geometry.text, model.config.text_dim)
    return (
        torch.randn(shape, device=device, generator=generator).to(dtype),
        torch.full((1,), 500, device=device),
        torch.randn(text, device=device, generator=generator).to(dtype),
    )


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
    # By name, also the default: resetting a model leaves the process's choice as it was.
    model.set_attention_backend(row.backend)
    if row.config is None:
        yield None
        return
    with apply(model, config=row.config, order=row.order, record=record) as psa:
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


def measure(model: nn.Module, arguments: tuple, row: Row, device: str, repeats: int) -> dict:
    """One row: times, memory, density."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def step() -> Tensor:
        return model(*arguments, return_dict=False)[0]

    about: dict[str, Any] = {}
    if row.config is not None:
        with attending(model, row, record=True) as psa:
            step()
            densities = [record.density for record in psa.records.read()]
            about["density"] = statistics.fmean(densities)
    with attending(model, row) as psa:
        step()
        wait()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        clock = Clock(device)
        for _ in range(repeats):
            clock.timed(step)
        about["step_ms"] = clock.milliseconds()
        if device == "cuda":
            about["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        about["attention_ms"] = attention_ms(step, psa, device)
        about["host_ms"] = 1e3 * host_seconds(step, lambda _: wait(), 1)[0]
    about["median_step_ms"] = statistics.median(about["step_ms"])
    about["attention_share"] = about["attention_ms"] / about["median_step_ms"]
    return about


def check(
    model: nn.Module, arguments: tuple, geometry: Geometry, backends: list[str]
) -> dict[str, float]:
    """Errors of the first self-attention to the dense default: of level 1, of other dense kernels.

    Of the attention, not of the step: to that, flat attention adds too little to show a mistake.

    Raises:
        ValueError: level 1 is not the dense attention.
    """
    attention, seen = model.blocks[0].attn1, []
    hook = attention.register_forward_hook(lambda *about: seen.append(about[2].float()))
    try:
        for row in (*map(Row, backends), Row(DEFAULT, LEVEL_ONE)):
            with attending(model, row):
                model(*arguments)
    finally:
        hook.remove()
    dense, *others, ordered = seen
    errors = {name: _relative(out, dense) for name, out in zip(backends[1:], others, strict=True)}
    # With the order once a model, attention sees its tokens in order.
    order = torch.from_numpy(gilbert_order(geometry.grid).astype("int64")).to(dense.device)
    found = _relative(ordered, dense[:, order])
    allowed = max([TOLERANCE, *(2 * error for error in errors.values())])
    if not found <= allowed:
        raise ValueError(f"level 1 differs from dense attention by {found:.2e}, over {allowed:.2e}")
    return {**errors, "level 1": found}


def _relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def run(
    names: list[str], device: str, *, rows: list[str], repeats: int, layers: int | None
) -> Iterator[dict[str, Any]]:
    """Rows of the models named, each after its model was checked.

    Args:
        names: keys of `MODELS`.
        device: 'cpu' or 'cuda'.
        rows: keys of `ROWS`.
        repeats: timed steps.
        layers: only the first so many of each model; None: all.
    """
    for name in names:
        geometry = MODELS[name]
        if layers is not None:
            geometry = dataclasses.replace(geometry, layers=min(layers, geometry.layers))
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        model = build(geometry, device, dtype)
        arguments = inputs(model, geometry, device, dtype)
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
            backends = [DEFAULT, CUDNN] if device == "cuda" else [DEFAULT]
            errors = check(model, arguments, geometry, backends)
            for row in rows:
                chosen = ROWS[row]
                if device == "cpu" and chosen.backend == CUDNN:
                    chosen = dataclasses.replace(chosen, backend=DEFAULT)
                found = measure(model, arguments, chosen, device, repeats)
                yield {**size, "provider": row, "errors": errors, **found}
        del model, arguments
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, print a line a row and store the rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model_step", description=__doc__)
    published = [name for name in MODELS if name != "tiny"]
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=published)
    parser.add_argument("--row", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, help="only so many layers of each model")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines are appended")
    args = parser.parse_args(argv)
    for name in ("repeats", "layers"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    first: dict[str, float] = {}
    with args.output.open("a", encoding="utf-8") as file:
        for row in run(
            args.model, args.device, rows=args.row, repeats=args.repeats, layers=args.layers
        ):
            file.write(json.dumps(row) + "\n")
            file.flush()
            base = first.setdefault(row["model"], row["median_step_ms"])
            if row["provider"] == args.row[0]:
                errors = ", ".join(f"{key} {value:.1e}" for key, value in row["errors"].items())
                print(f"\n{row['model']}, {row['layers']} layers, {row['tokens']} tokens: {errors}")
            print(
                f"  {row['provider']:36s} step {row['median_step_ms']:9.1f} ms, "
                f"{base / row['median_step_ms']:.2f}x  attention {row['attention_ms']:9.1f} ms "
                f"({row['attention_share']:.0%})  host {row['host_ms']:7.1f} ms  "
                f"density {row.get('density', 1):.1%}  peak {row.get('peak_gib', 0):.1f} GiB",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
