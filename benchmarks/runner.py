"""Runs workloads, prints a line per row and stores the rows as JSON lines."""

from __future__ import annotations

import dataclasses
import datetime
import gc
import json
import os
import statistics
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from benchmarks.accuracy import (
    TOLERANCE,
    expected_spots,
    relative_difference,
    spot_error,
    spot_heads,
)
from benchmarks.inputs import make_inputs
from benchmarks.machine import describe
from benchmarks.session import BINARY, DENSE, GIVEN, PART, Provider, Session
from benchmarks.workloads import BACKWARD, FORWARD, Workload
from shared_specs.flops import attention_flops
from shared_specs.masks import density
from shared_specs.selection import candidate_blocks

OK, SKIPPED, WRONG, FAILED = "ok", "skipped", "wrong", "failed"
# Multiplications of each pass over those of the forward pass: two products forward, five
# backward (the logits once more, then dv, dP, dq, dk).
_PASS_FLOPS = {FORWARD: 1.0, BACKWARD: 2.5, "forward+backward": 3.5}
FRAMEWORKS = ("torch", "jax")


def run(
    chosen: list[Workload],
    output: Path,
    *,
    provider: str = "",
    repeats: int = 10,
    frameworks: tuple[str, ...] = FRAMEWORKS,
) -> list[dict[str, Any]]:
    """Time every provider on every workload.

    Args:
        chosen: the workloads.
        output: file the rows are appended to, made if absent.
        provider: only providers whose name contains this, besides the dense ones that the
            others are compared with.
        repeats: timed runs per row.
        frameworks: which to run, 'torch' and 'jax'.

    Returns:
        The rows.
    """
    # Both frameworks may share one GPU: JAX must not reserve most of its memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    output.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    with output.open("a", encoding="utf-8") as file:
        for workload in chosen:
            print(f"\n{workload.name}", flush=True)
            inputs = make_inputs(workload)
            for framework in frameworks:
                for row in _framework_rows(framework, workload, inputs, provider, repeats):
                    _emit(row, file)
                    rows.append(row)
                gc.collect()
    print(f"\n{len(rows)} rows in {output}")
    return rows


def open_session(framework: str, workload: Workload, inputs: dict[str, np.ndarray]) -> Session:
    """A framework with the inputs on its device.

    Raises:
        ImportError: the framework is not installed.
        ValueError: it has no such device.
    """
    if framework == "torch":
        from benchmarks.torch_session import TorchSession as Kind
    else:
        from benchmarks.jax_session import JaxSession as Kind
    return Kind(workload, inputs)


def _framework_rows(framework, workload, inputs, wanted, repeats) -> Iterator[dict[str, Any]]:
    try:
        session = open_session(framework, workload, inputs)
        providers = session.providers()
    except Exception as error:  # one framework's crash must not lose the other's rows
        yield {**_about(workload), "provider": framework, **_stopped(error)}
        return
    heads = spot_heads(workload)
    rounded = {name: _as_read(session, name, workload) for name in ("q", "k", "v")}
    reference = None
    # The oracle's answers by mask: providers of one kind of mask share them.
    spots: dict[str | None, list] = {}
    for provider in providers:
        if wanted not in provider.name and not (provider.kind == DENSE and reference is None):
            continue
        passes = (FORWARD,) if provider.kind == PART else workload.passes
        checked: dict[str, Any] = {}
        for which in passes:
            row = {
                **_about(workload),
                "framework": framework,
                "provider": provider.name,
                "kind": provider.kind,
                "pass": which,
            }
            try:
                call = provider.build(which)
                if which == FORWARD and provider.kind != PART:
                    out = session.numpy(provider.output(call()), heads)
                    if reference is None and provider.kind == DENSE:
                        reference = out
                    mask = BINARY if provider.kind == BINARY else provider.levels and GIVEN
                    if mask not in spots:
                        levels = None if provider.levels is None else provider.levels()
                        spots[mask] = expected_spots(rounded, levels, provider.block_n, workload)
                    checked = _check(out, reference, spots[mask], workload)
                row |= checked
                row |= _measure(session, call, repeats)
                row |= _rates(row, provider, workload, which)
                del call
            except Exception as error:  # one provider's crash must not lose the others' rows
                row |= _stopped(error)
            yield row
            if row["status"] in (SKIPPED, FAILED) and which == FORWARD:
                break


def _as_read(session: Session, name: str, workload: Workload) -> np.ndarray:
    heads = workload.heads if name == "q" else workload.kv_heads
    return session.numpy(getattr(session, name), list(range(heads)))


def _check(out, reference, expected: list, workload: Workload) -> dict[str, Any]:
    error = spot_error(out, expected)
    right = error <= TOLERANCE[workload.dtype]
    return {
        "status": OK if right else WRONG,
        "error_oracle": error,
        "error_dense": None if reference is None else relative_difference(out, reference),
        **({} if right else {"reason": f"error {error:.1e} against the oracle"}),
    }


def _measure(session: Session, call: Callable[[], Any], repeats: int) -> dict[str, Any]:
    times = sorted(1e3 * value for value in session.times(call, repeats))
    low, high = np.percentile(times, [20, 80])
    return {
        "ms_median": round(statistics.median(times), 5),
        "ms_p20": round(float(low), 5),
        "ms_p80": round(float(high), 5),
        "repeats": repeats,
        "host_ms": _host_ms(session, call, repeats),
        "peak_bytes": session.peak_bytes(call),
    }


def _host_ms(session: Session, call: Callable[[], Any], repeats: int) -> float | None:
    """Median time until the call returns, the device idle before it: the host's share."""
    times = session.host_seconds(call, repeats)
    return None if times is None else round(1e3 * statistics.median(times), 4)


def _rates(row: dict, provider: Provider, workload: Workload, which: str) -> dict[str, Any]:
    if provider.kind == PART:
        return {"status": OK}
    if provider.levels is None:
        flops, share = workload.dense_flops(), 1.0
    else:
        config, levels = workload.config, provider.levels()
        sizes = (workload.length, workload.length, workload.head_dim)
        wide = dataclasses.replace(config, block_n=provider.block_n)
        candidates = candidate_blocks(workload.length, workload.length, wide)
        flops = attention_flops(
            levels,
            *sizes,
            config.block_m,
            provider.block_n,
            rest=config.rest,
            candidates=candidates,
        )
        share = density(levels, candidates=candidates, rest_share=wide.rest_share)
    flops = int(flops * _PASS_FLOPS[which])
    return {
        "density": share,
        "flops": flops,
        "tflops_per_s": round(flops / row["ms_median"] / 1e9, 3),
    }


def _about(workload: Workload) -> dict[str, Any]:
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "workload": workload.name,
        **{
            field: getattr(workload, field)
            for field in ("heads", "kv_heads", "length", "head_dim", "dtype")
        },
        "causal": workload.config.causal,
        "machine": describe(workload.device),
    }


def _stopped(error: Exception) -> dict[str, Any]:
    """A provider that cannot run here says so with ImportError or ValueError; all else is a bug."""
    skipped = isinstance(error, (ImportError, ValueError))
    if not skipped:
        traceback.print_exception(error)
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    return {"status": SKIPPED if skipped else FAILED, "reason": reason}


def _emit(row: dict[str, Any], file: TextIO) -> None:
    file.write(json.dumps(row) + "\n")
    file.flush()
    label = f"  {row['provider']:<26} {row.get('pass', ''):<17}"
    if "ms_median" not in row:
        print(f"{label} {row['status']}: {row['reason']}", flush=True)
        return
    spread = f"{row['ms_median']:10.3f} ms ({row['ms_p20']:.3f} - {row['ms_p80']:.3f})"
    more = ""
    if "density" in row:
        more = f"  {row['tflops_per_s']:8.2f} TFLOP/s  density {row['density']:.1%}"
    if row.get("error_dense") is not None:
        more += f"  error {row['error_dense']:.1e}"
    if row["peak_bytes"] is not None:
        more += f"  peak {row['peak_bytes'] / 2**20:,.0f} MiB"
    print(f"{label} {spread}{more}  {row['status']}", flush=True)
