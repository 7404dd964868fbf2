"""Every implementation that can run here, against the oracle and against each other."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from shared_specs.attention import sparse_attention, sparse_attention_grad
from shared_specs.config import PSAConfig, resolve_scale
from shared_specs.geometry import cdiv
from shared_specs.importance import block_scores
from shared_specs.selection import select_levels

ADAPTER_MODULES = ("psa_torch.conformance", "psa_jax.conformance")
"""Each has `adapters(device)`."""

OUTPUTS = ("out", "lse", "dq", "dk", "dv")
DENSE_OUTPUTS = ("out", "dq", "dk", "dv")
DTYPES = ("float32", "float16", "bfloat16")
BUDGET = 2.0
"""Largest accepted error as a multiple of plain dense attention's in the same dtype."""
LEVEL_AGREEMENT = 0.999


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """One set of shapes; see the specification, section 1."""

    name: str
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    q_len: int
    kv_len: int
    head_dim: int = 64
    block_m: int = 128
    block_n: int = 64
    is_causal: bool = False
    scale: float | None = None


SIZES: dict[str, tuple[Workload, ...]] = {
    "tiny": (
        Workload(name="ragged", q_len=140, kv_len=203),
        Workload(name="causal grouped", kv_heads=1, q_len=100, kv_len=150, is_causal=True),
    ),
    "small": tuple(
        Workload(name=f"{n} keys{' causal' if causal else ''}", batch=2, heads=4, kv_heads=kv_heads,
                 q_len=q_len, kv_len=640 + 37, head_dim=dim, block_m=m, block_n=n, is_causal=causal)
        for (m, n), dim, kv_heads, causal, q_len in (
            ((128, 64), 64, 4, False, 677),
            ((128, 64), 128, 2, True, 677),
            ((64, 32), 64, 1, False, 500),
            ((128, 32), 128, 4, True, 300),
            ((128, 128), 64, 2, False, 677),
            ((64, 128), 128, 4, True, 677),
        )
    ),
    "large": (
        Workload(name="4k", q_len=4096, kv_len=4096, head_dim=128),
        Workload(name="4k ragged causal grouped", heads=4, kv_heads=2, q_len=4001, kv_len=4133,
                 head_dim=64, is_causal=True),
    ),
}  # fmt: skip
"""Sizes by name: 'tiny' is for interpreters, 'large' for a GPU."""


def find_adapters(device: str) -> tuple[list[Any], dict[str, str]]:
    """Adapters that can run on 'cpu' or 'gpu', and the reason for each that cannot."""
    found, missing = [], {}
    for module in ADAPTER_MODULES:
        try:
            offered = importlib.import_module(module).adapters(device)
        except ImportError as error:
            missing[module.partition(".")[0]] = str(error)
            continue
        for adapter in offered:
            reason = adapter.unavailable()
            if reason is None:
                found.append(adapter)
            else:
                missing[adapter.name] = reason
    return found, missing


def run_parity(
    adapters: Sequence[Any],
    workloads: Iterable[Workload],
    dtypes: Iterable[str] = DTYPES,
    progress: Callable[[Sequence], Iterable] = iter,
) -> dict[str, list[dict[str, Any]]]:
    """Errors against the oracle, differences between pairs, agreement of scores and levels.

    Returns:
        {'errors': rows, 'pairs': rows, 'selection': rows}; plain data.
    """
    workloads, dtypes = list(workloads), list(dtypes)
    errors, pairs, selection = [], [], []
    exact: dict[str, _Exact] = {}
    for workload, dtype in progress(list(itertools.product(workloads, dtypes))):
        if workload.name not in exact:
            exact = {workload.name: _Exact(workload)}  # one at a time: they are large
        truth = exact[workload.name]
        answers = {}
        for adapter in adapters:
            try:
                answers[adapter.name] = _ask(adapter, workload, truth.inputs, dtype)
            except NotImplementedError as reason:
                errors.append(_row(workload, dtype, adapter.name, skipped=str(reason)))
                continue
            yardstick = _yardstick(adapter, workload, truth, dtype)
            for name in OUTPUTS:
                largest, relative = difference(answers[adapter.name][name], truth.sparse[name])
                limit = BUDGET * yardstick["out" if name == "lse" else name]
                errors.append(
                    _row(workload, dtype, adapter.name, output=name, largest=largest,
                         relative=relative, limit=limit, ok=relative <= limit)
                )  # fmt: skip
        for a, b in itertools.combinations(answers, 2):
            for name in OUTPUTS:
                largest, relative = difference(answers[a][name], answers[b][name])
                pairs.append(
                    _row(workload, dtype, f"{a} / {b}", output=name, largest=largest,
                         relative=relative)
                )  # fmt: skip
    for workload, importance in itertools.product(workloads, ("pooled", "sampled", "antidiagonal")):
        selection += _selection_rows(adapters, workload, importance)
    return {"errors": errors, "pairs": pairs, "selection": selection}


def failures(results: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows over their limit."""
    return [row for row in results["errors"] + results["selection"] if row.get("ok") is False]


def draw_inputs(workload: Workload) -> dict[str, np.ndarray]:
    """Fresh inputs seeded by the workload; exact in every dtype, with levels of every kind."""
    w = workload
    rng = np.random.default_rng(list(w.name.encode()))

    def tensor(heads, length, width):
        shape = (w.batch, heads, length, *([width] if width else []))
        return (np.clip(np.round(rng.standard_normal(shape) * 64), -256, 256) / 64).astype("f4")

    n_q, n_k = cdiv(w.q_len, w.block_m), cdiv(w.kv_len, w.block_n)
    shares = [0.45, 0.2, 0.1, 0.1, 0.15]
    levels = rng.choice([0, 1, 2, 4, 8], (w.batch, w.heads, n_q, n_k), p=shares)
    if n_q > 1:
        levels[0, 0, 0] = 0  # a query block that sees nothing
    return {
        "q": tensor(w.heads, w.q_len, w.head_dim),
        "k": tensor(w.kv_heads, w.kv_len, w.head_dim),
        "v": tensor(w.kv_heads, w.kv_len, w.head_dim),
        "levels": levels.astype(np.int32),
        "dout": tensor(w.heads, w.q_len, w.head_dim),
        "dlse": tensor(w.heads, w.q_len, 0),
    }


def difference(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Largest absolute and relative Frobenius difference; infinite where only one is finite."""
    finite = np.isfinite(a) & np.isfinite(b)
    if not np.array_equal(np.where(finite, 0, a), np.where(finite, 0, b)):
        return float("inf"), float("inf")
    a, b = np.where(finite, a, 0), np.where(finite, b, 0)
    gap, size = np.linalg.norm(a - b), np.linalg.norm(b)
    return float(np.abs(a - b).max()), float(gap / size) if size else float(gap)


def _geometry(workload: Workload) -> dict[str, Any]:
    return {
        "block_m": workload.block_m,
        "block_n": workload.block_n,
        "scale": workload.scale,
        "is_causal": workload.is_causal,
    }


class _Exact:
    """What a workload's answers are compared with.

    Attributes:
        inputs: from `draw_inputs`.
        sparse: the oracle's outputs by name.
        dense_inputs, dense: inputs and exact outputs of dense attention, the yardstick. Under a
            causal mask with as many queries as keys, since frameworks differ in what they let the
            last query see otherwise.
    """

    def __init__(self, workload: Workload):
        w = workload
        self.inputs = x = draw_inputs(w)
        call = (x["q"], x["k"], x["v"], x["levels"])
        self.sparse = dict(
            zip(OUTPUTS, _attend(call, x["dout"], x["dlse"], _geometry(w)), strict=True)
        )
        length = min(w.q_len, w.kv_len) if w.is_causal else None
        self.dense_inputs = tuple(x[name][:, :, :length] for name in ("q", "k", "v", "dout"))
        q, k, v, dout = self.dense_inputs
        n_q, n_k = cdiv(q.shape[2], w.block_m), cdiv(k.shape[2], w.block_n)
        ones = np.ones((w.batch, w.heads, n_q, n_k), np.int32)
        out, _, *grads = _attend((q, k, v, ones), dout, None, _geometry(w))
        self.dense = dict(zip(DENSE_OUTPUTS, (out, *grads), strict=True))


def _attend(call: tuple, dout, dlse, geometry: dict) -> tuple[np.ndarray, ...]:
    q, k, v, levels = call
    forward = sparse_attention(q, k, v, levels, **geometry, return_lse=True)
    grads = sparse_attention_grad(q, k, v, levels, dout, **geometry, dlse=dlse)
    return (*forward, *grads)


def _ask(adapter, workload: Workload, x: dict, dtype: str) -> dict[str, np.ndarray]:
    limits = adapter.capabilities().get("dtype")
    if limits is not None and dtype not in limits:
        raise NotImplementedError(f"dtype {dtype}; it has {', '.join(sorted(limits))}")
    call = {**_geometry(workload), "dtype": dtype}
    forward = adapter.forward(x["q"], x["k"], x["v"], x["levels"], **call)
    backward = adapter.backward(x["q"], x["k"], x["v"], x["levels"], x["dout"], x["dlse"], **call)
    return dict(zip(OUTPUTS, (*forward, *backward), strict=True))


def _yardstick(adapter, workload: Workload, truth: _Exact, dtype: str) -> dict[str, float]:
    """Relative error of the framework's own dense attention on the same q, k, v."""
    w = workload
    scale = resolve_scale(w.scale, w.head_dim)
    got = adapter.dense(*truth.dense_inputs, scale=scale, is_causal=w.is_causal, dtype=dtype)
    # No dtype does better than the rounding of its own result, however dense the sum.
    least = {"float32": 2.0**-20, "float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    return {
        name: max(difference(x, truth.dense[name])[1], least)
        for name, x in zip(DENSE_OUTPUTS, got, strict=True)
    }


def _selection_rows(adapters, workload: Workload, importance: str) -> list[dict[str, Any]]:
    w = workload
    x = draw_inputs(w)
    config = PSAConfig(
        block_m=w.block_m, block_n=w.block_n, importance=importance, causal=w.is_causal,
        scale=w.scale, mask_ratios={1: (0, 0.2), 2: (0.2, 0.3), 4: (0.3, 0.4), 8: (0.4, 0.8)},
        tile_n=min(w.block_n, 16),
    )  # fmt: skip
    exact = block_scores(x["q"], x["k"], config)
    lengths: dict[str, Any] = {"q_len": w.q_len, "kv_len": w.kv_len}
    levels = select_levels(exact, config, **lengths)
    rows = []
    for adapter in adapters:
        scores = adapter.scores(x["q"], x["k"], config)
        largest, relative = difference(scores, exact)
        from_own = adapter.select(scores, config, **lengths, cap=None)
        from_equal = adapter.select(exact, config, **lengths, cap=None)
        agreement = float((from_own == levels).mean())
        exactly = bool((from_equal == levels).all())
        rows.append(
            _row(w, importance, adapter.name, output="levels", largest=largest, relative=relative,
                 agreement=agreement, exact_from_equal_scores=exactly,
                 ok=exactly and agreement >= LEVEL_AGREEMENT)
        )  # fmt: skip
    return rows


def _row(workload: Workload, dtype: str, who: str, **values: Any) -> dict[str, Any]:
    return {"workload": workload.name, "dtype": dtype, "implementation": who, **values}
