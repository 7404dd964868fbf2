"""Asking an adapter the cases and comparing its answers."""

from __future__ import annotations

import dataclasses
import inspect
import traceback
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from shared_specs.config import PSAConfig
from shared_specs.conformance.adapter import Adapter
from shared_specs.conformance.suite import Case
from shared_specs.geometry import cdiv

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
OUTPUTS = {
    "select": ("levels",),
    "table": ("entries", "counts"),
    "forward": ("out", "lse"),
    "backward": ("dq", "dk", "dv"),
    "order": ("order",),
}
ERROR_MAP_SIDE = 64
MOST_MISTAKES = 5


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of one case at one dtype.

    Attributes:
        case: the case's id.
        dtype: precision asked for; 'exact' where there is none.
        status: 'passed', 'failed' or 'skipped'.
        message: why it was skipped or how it failed.
        error: largest error over all outputs as a multiple of its tolerance; NaN if unknown.
        output: the output with that error.
        where: index of that error in that output.
        got, expected: the two values there.
        error_map: `[rows, columns]` of the failing output's error, for pictures; or None.
    """

    case: str
    dtype: str
    status: str
    message: str = ""
    error: float = float("nan")
    output: str = ""
    where: tuple[int, ...] = ()
    got: float = float("nan")
    expected: float = float("nan")
    error_map: np.ndarray | None = None


def run_suite(
    adapter: Adapter,
    cases: Iterable[Case],
    dtypes: Iterable[str] | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> list[Result]:
    """Every case at every dtype it has a tolerance for.

    Args:
        adapter: the implementation.
        cases: from `load_suite`.
        dtypes: only these; None means all. Exact cases always run.
        progress: wraps the list of (case, dtype) pairs, for instance in a progress bar.
    """
    pairs = [(case, dtype) for case in cases for dtype in case_dtypes(case, dtypes)]
    return [run_case(adapter, case, dtype) for case, dtype in progress(pairs)]


def run_case(adapter: Adapter, case: Case, dtype: str) -> Result:
    """Ask one case; an exception of the adapter is a failure, a missing ability a skip."""
    reason = _why_not(adapter, case, dtype)
    if reason:
        return Result(case.id, dtype, SKIPPED, reason)
    arrays = case.arrays()
    try:
        answer = _ask(adapter, case, arrays, dtype)
    except NotImplementedError as error:
        return Result(case.id, dtype, SKIPPED, str(error) or f"adapter has no {case.tier}")
    except Exception as error:  # noqa: BLE001 - any failure of foreign code is a result
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{last.filename}:{last.lineno}"
        return Result(case.id, dtype, FAILED, f"{type(error).__name__}: {error} ({place})")
    return _compared(case, dtype, answer, arrays)


def case_dtypes(case: Case, wanted: Iterable[str] | None) -> Iterator[str]:
    if not case.tolerance:
        yield "exact"
    else:
        yield from (dtype for dtype in case.tolerance if wanted is None or dtype in wanted)


def _why_not(adapter: Adapter, case: Case, dtype: str) -> str:
    """The reason an adapter cannot be asked a case, or ''."""
    method = getattr(type(adapter), case.tier, None) or getattr(adapter, case.tier, None)
    if method is None or method is getattr(Adapter, case.tier):
        return f"adapter has no {case.tier}"
    if "lengths" in case.requires and not _takes_lengths(method):
        return f"needs lengths True; adapter has no q_lens in {case.tier}"
    offered = adapter.capabilities() if hasattr(adapter, "capabilities") else {}
    needs = dict(case.requires)
    if case.tolerance:
        needs["dtype"] = [dtype]
    for key, values in needs.items():
        missing = [value for value in values if key in offered and value not in offered[key]]
        if missing:
            have = ", ".join(map(str, offered[key]))
            return f"needs {key} {', '.join(map(str, missing))}; adapter has {have}"
    return ""


def _takes_lengths(method: Callable) -> bool:
    parameters = inspect.signature(method).parameters.values()
    return any(p.name == "q_lens" or p.kind is p.VAR_KEYWORD for p in parameters)


def _poisoned(arrays: dict) -> dict:
    """The arrays with NaN past the lengths of their sequences, where they have any."""
    arrays = dict(arrays)
    for lens, names in (("q_lens", ("q", "dout", "dlse")), ("kv_lens", ("k", "v"))):
        for name in names:
            if lens in arrays and name in arrays:
                arrays[name] = arrays[name].copy()
                for b, length in enumerate(arrays[lens]):
                    arrays[name][b, :, length:] = np.nan
    return arrays


def _ask(adapter: Adapter, case: Case, arrays: dict, dtype: str) -> tuple:
    parameters = dict(case.parameters)
    if case.tier == "select":
        config = PSAConfig.from_dict(parameters.pop("config"))
        return (adapter.select(arrays["scores"], config, cap=arrays.get("cap"), **parameters),)
    if case.tier == "table":
        return tuple(adapter.table(arrays["levels"], **parameters))
    if case.tier == "order":
        grid, tile = parameters["grid"], parameters["tile"]
        return (adapter.order(parameters["method"], tuple(grid), tile and tuple(tile)),)
    arrays = _poisoned(arrays)
    parameters |= {name: arrays[name] for name in ("q_lens", "kv_lens") if name in arrays}
    wide = np.float64 if dtype == "float64" else np.float32
    q, k, v = (arrays[name].astype(wide) for name in "qkv")
    if case.tier == "forward":
        return tuple(adapter.forward(q, k, v, arrays["levels"], **parameters, dtype=dtype))
    dout, dlse = arrays["dout"].astype(wide), arrays.get("dlse")
    dlse = None if dlse is None else dlse.astype(wide)
    return tuple(adapter.backward(q, k, v, arrays["levels"], dout, dlse, **parameters, dtype=dtype))


def _compared(case: Case, dtype: str, answer: tuple, arrays: dict) -> Result:
    worst = Result(case.id, dtype, PASSED, error=0.0)
    for name, got in zip(OUTPUTS[case.tier], answer, strict=False):
        expected = arrays[f"expected_{name}"]
        if got is None and name == "lse":
            continue
        got = np.asarray(got)
        if got.shape != expected.shape:
            return Result(
                case.id,
                dtype,
                FAILED,
                f"{name} has shape {got.shape}, expected {expected.shape}",
                error=float("inf"),
                output=name,
            )
        errors = _errors(got, expected, case.tolerance.get(dtype, {}).get(name))
        if errors.size and not errors.max() <= worst.error:
            at = np.unravel_index(int(errors.argmax()), errors.shape)
            worst = dataclasses.replace(
                worst,
                error=float(errors[at]),
                output=name,
                where=tuple(int(i) for i in at),
                got=float(got[at]),
                expected=float(expected[at]),
                error_map=_error_map(errors),
            )
    if worst.error <= 1.0:
        return dataclasses.replace(worst, error_map=None)
    found = f"{worst.output}{list(worst.where)} is {worst.got:.6g}, expected {worst.expected:.6g}"
    return dataclasses.replace(worst, status=FAILED, message=found)


def _errors(got: np.ndarray, expected: np.ndarray, tolerance: float | None) -> np.ndarray:
    """Error of every element as a multiple of the tolerance; infinite where not comparable."""
    if tolerance is None:
        return np.where(got == expected, 0.0, np.inf)
    got, expected = got.astype(np.float64), expected.astype(np.float64)
    with np.errstate(invalid="ignore"):
        errors = np.abs(got - expected) / tolerance
    errors[got == expected] = 0.0  # equal infinities
    return np.where(np.isnan(errors), np.inf, errors)


def _error_map(errors: np.ndarray) -> np.ndarray:
    """The error as rows by columns, shrunk by maxima to what a picture needs."""
    flat = errors.reshape(-1, errors.shape[-1]) if errors.ndim > 1 else errors[None]
    for axis in (0, 1):
        step = cdiv(flat.shape[axis], ERROR_MAP_SIDE)
        flat = np.maximum.reduceat(flat, np.arange(0, flat.shape[axis], step), axis=axis)
    return flat


def likely_mistakes(cases: Iterable[Case], results: Iterable[Result]) -> list[str]:
    """Flags whose mistake would explain the failures.

    Those that fail exactly the cases that failed; where there is none, since two mistakes can be
    made at once, the widest of those that fail nothing but cases that failed.
    """
    flags_of = {case.id: case.flags for case in cases}
    ran: dict[str, set[str]] = {}
    failed = set()
    for result in results:
        if result.status == SKIPPED:
            continue
        if result.status == FAILED:
            failed.add(result.case)
        for flag in flags_of[result.case]:
            ran.setdefault(flag, set()).add(result.case)
    exact = [flag for flag, ids in ran.items() if ids == failed]
    if exact:
        return exact
    explained = [flag for flag, ids in ran.items() if ids <= failed]
    return sorted(explained, key=lambda flag: -len(ran[flag]))[:MOST_MISTAKES]
