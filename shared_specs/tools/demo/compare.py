"""Dense attention against pyramid and binary masks of equal cost, in every framework present."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from shared_specs.config import PSAConfig
from shared_specs.masks import density
from shared_specs.tools.demo.frameworks import Framework, dense_levels, timed
from shared_specs.tools.demo.masks import binary_of_equal_cost, scaled

PYRAMID, BINARY = "pyramid", "binary"
METHODS = (PYRAMID, BINARY)
# 1 is the configuration itself; the others scale its ratios for the curve of the figure.
FACTORS = (1 / 3, 2 / 3, 1.0, 1.5, 2.0)

Step = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodResult:
    """One mask against dense attention.

    Attributes:
        density: mean cost of a block, 1 for dense.
        error: norm of the difference over the norm of the dense output, all heads together.
        error_by_head: the same for each head.
        psnr: `20 log10(max |dense| / rms difference)` in dB.
        whole_blocks: key blocks at level 1, mean of a row.
        seconds: framework title -> median time of the whole call from q, k, v.
    """

    density: float
    error: float
    error_by_head: list[float]
    psnr: float
    whole_blocks: float
    seconds: dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything the demo's table and figure show.

    Attributes:
        shape: (batch, heads, tokens, head dimension).
        dense_seconds: framework title -> median time of dense attention.
        methods: method -> its result at the given configuration.
        curves: method -> results at several scales of the ratios, not timed.
        levels: the pyramid mask, int32 `[B, H, Nq, Nk]`.
        frameworks_differ: largest difference between two frameworks' outputs, relative to the
            largest value, per method; None with one framework.
        levels_agree: least share of blocks on which two frameworks chose the same level.
    """

    shape: tuple[int, int, int, int]
    dense_seconds: dict[str, float]
    methods: dict[str, MethodResult]
    curves: dict[str, list[MethodResult]]
    levels: np.ndarray
    frameworks_differ: dict[str, float] | None
    levels_agree: float | None


def steps(frameworks: list[Framework]) -> int:
    """How often `compare` calls `step`."""
    return len(frameworks) * (1 + len(METHODS)) + len(FACTORS) - 1


def compare(
    qkv: tuple[np.ndarray, np.ndarray, np.ndarray],
    config: PSAConfig,
    frameworks: list[Framework],
    *,
    repeats: int = 3,
    step: Step = lambda what: None,
) -> Comparison:
    """Run and time everything.

    Args:
        qkv: float32 `[B, H, L, D]` each.
        config: the pyramid configuration; the binary one follows from the levels it chooses.
        frameworks: at least one; the first one's outputs are the ones judged.
        repeats: timed calls per median.
        step: called with a description before each unit of work.
    """
    first = frameworks[0]
    first_inputs = tuple(first.array(x) for x in qkv)
    reference: Any = None
    dense_seconds: dict[str, float] = {}
    outputs: dict[str, list[np.ndarray]] = {method: [] for method in METHODS}
    chosen: dict[str, list[np.ndarray]] = {method: [] for method in METHODS}
    seconds: dict[str, dict[str, float]] = {method: {} for method in METHODS}
    configs = {PYRAMID: config}
    for framework in frameworks:
        inputs: Any = first_inputs if framework is first else tuple(framework.array(x) for x in qkv)
        step(f"{framework.title}: dense")
        dense_seconds[framework.title], out = timed(
            framework, lambda f=framework, x=inputs: f.dense(*x), repeats
        )
        if reference is None:
            reference = framework.numpy(out)
        for method in METHODS:
            step(f"{framework.title}: {method} mask")
            if method == BINARY and BINARY not in configs:
                configs[BINARY] = binary_of_equal_cost(config, chosen[PYRAMID][0])
            seconds[method][framework.title], (out, levels) = timed(
                framework,
                lambda f=framework, x=inputs, c=configs[method]: f.sparse(x[0], x[1], x[2], c),
                repeats,
            )
            outputs[method].append(framework.numpy(out))
            chosen[method].append(dense_levels(framework, levels))
    results = {
        method: _judge(outputs[method][0], reference, chosen[method][0], seconds[method])
        for method in METHODS
    }
    return Comparison(
        shape=qkv[0].shape,
        dense_seconds=dense_seconds,
        methods=results,
        curves=_curves(first, first_inputs, config, reference, results, step),
        levels=chosen[PYRAMID][0],
        frameworks_differ=_differences(outputs) if len(frameworks) > 1 else None,
        levels_agree=_agreement(chosen) if len(frameworks) > 1 else None,
    )


def _judge(
    out: np.ndarray, reference: np.ndarray, levels: np.ndarray, seconds: dict[str, float]
) -> MethodResult:
    difference = (out - reference).astype(np.float64)
    by_head = np.sqrt((difference**2).sum((0, 2, 3)) / (reference**2).sum((0, 2, 3)))
    rms = np.sqrt((difference**2).mean())
    return MethodResult(
        density=density(levels),
        error=float(np.linalg.norm(difference) / np.linalg.norm(reference)),
        error_by_head=[float(value) for value in by_head],
        psnr=float(20 * np.log10(np.abs(reference).max() / rms)) if rms else float("inf"),
        whole_blocks=float((levels == 1).sum(-1).mean()),
        seconds=seconds,
    )


def _curves(framework, inputs, config, reference, results, step) -> dict[str, list[MethodResult]]:
    curves: dict[str, list[MethodResult]] = {method: [] for method in METHODS}
    for factor in FACTORS:
        if factor == 1.0:
            for method in METHODS:
                curves[method].append(results[method])
            continue
        step(f"error at {factor:.2g} times the ratios")
        pyramid = scaled(config, factor)
        out, levels = framework.sparse(*inputs, pyramid)
        levels = dense_levels(framework, levels)
        binary = binary_of_equal_cost(pyramid, levels)
        binary_out, binary_levels = framework.sparse(*inputs, binary)
        for method, result, mask in (
            (PYRAMID, out, levels),
            (BINARY, binary_out, dense_levels(framework, binary_levels)),
        ):
            curves[method].append(_judge(framework.numpy(result), reference, mask, {}))
    return curves


def _differences(outputs: dict[str, list[np.ndarray]]) -> dict[str, float]:
    return {
        method: max(float(np.abs(x - outs[0]).max()) for x in outs[1:])
        / float(np.abs(outs[0]).max())
        for method, outs in outputs.items()
    }


def _agreement(chosen: dict[str, list[np.ndarray]]) -> float:
    return min(
        float((levels == masks[0]).mean()) for masks in chosen.values() for levels in masks[1:]
    )
