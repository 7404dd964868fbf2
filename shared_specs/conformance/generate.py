"""Writes the committed cases: `python -m shared_specs.conformance.generate [FOLDER]`.

Answers come from the specification in long double and are rounded once to float64, so the bytes
do not depend on the processor's vector units or the BLAS at hand (x86-64; elsewhere long double
has other digits and a last bit may differ). Inputs come from the raw Philox stream.

The flags of a case are measured: a case names a mistake when the deliberately wrong
implementation that makes it (see `mutants`) fails the case clearly. A mutant that fails it by
less than `CLEAR` times the tolerance stops the generator: the case would then catch the mistake
on one machine and miss it on another.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from shared_specs.config import PSAConfig
from shared_specs.conformance.case_list import CASES, Draft
from shared_specs.conformance.mutants import MUTANTS
from shared_specs.conformance.reference import NumpyAdapter
from shared_specs.conformance.runner import FAILED, OUTPUTS, run_case
from shared_specs.conformance.suite import DATA, SCHEMA, Case, load_suite
from shared_specs.geometry import cdiv

VERSIONS = {"v1": "1.0.0", "v2": "2.0.0"}
CLEAR = 8.0
UNIT = 64
"""Inputs are multiples of 1/UNIT."""
UNIT_ROUNDOFF = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def main(parent: Path) -> None:
    """Write the cases and the index of every version to its folder, removing what was there."""
    for name in VERSIONS:
        _write(parent / name, CASES[name])
    load_suite(parent / DATA.name)


def _write(folder: Path, drafts: list[Draft]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("*.npz"), folder / "index.json"]:
        old.unlink(missing_ok=True)
    entries = []
    for draft in drafts:
        stored, tolerance = _arrays(draft)
        data = _npz(stored)
        (folder / f"{draft.id}.npz").write_bytes(data)
        entry = {
            "id": draft.id,
            "file": f"{draft.id}.npz",
            "sha256": hashlib.sha256(data).hexdigest(),
            "tier": draft.tier,
            "rule": draft.rule,
            "flags": [],
            "requires": draft.requires,
            "parameters": draft.parameters,
            "tolerance": tolerance,
        }
        entry["flags"] = _measured_flags(Case(**entry, folder=folder))
        entries.append(entry)
    index = {"schema": SCHEMA, "suite": VERSIONS[folder.name]}
    before = [name for name in VERSIONS if name < folder.name]
    index |= {"contains": before} if before else {}
    index |= {"cases": entries}
    (folder / "index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def differences(parent: Path = DATA.parent) -> list[str]:
    """Files that a fresh run would write differently."""

    def files(parent: Path) -> dict[str, bytes]:
        paths = [path for name in VERSIONS for path in (parent / name).iterdir() if path.is_file()]
        return {str(path.relative_to(parent)): path.read_bytes() for path in paths}

    with tempfile.TemporaryDirectory() as scratch:
        main(Path(scratch))
        fresh = files(Path(scratch))
    kept = files(parent)
    return sorted(name for name in {*fresh, *kept} if fresh.get(name) != kept.get(name))


def _measured_flags(case: Case) -> list[str]:
    dtype = "float64" if case.tolerance else "exact"
    reference = run_case(NumpyAdapter(), case, dtype)
    if reference.status == FAILED or reference.error > 0.5:
        raise RuntimeError(f"{case.id}: the reference is at {reference.error} of its tolerance")
    flags = []
    for flag, mutant in MUTANTS.items():
        result = run_case(mutant, case, dtype)
        if result.status == FAILED:
            if result.error < CLEAR:
                raise RuntimeError(f"{case.id}: {flag} is caught by {result.error} only")
            flags.append(flag)
    return flags


class _Stream:
    """Integers from the raw Philox stream, the same everywhere."""

    def __init__(self, name: str):
        self._bits = np.random.Philox(key=zlib.crc32(name.encode()))

    def below(self, limit: int, shape: tuple[int, ...]) -> np.ndarray:
        raw = self._bits.random_raw(math.prod(shape)).reshape(shape)
        return ((raw >> np.uint64(11)) % np.uint64(limit)).astype(np.int64)

    def choice(self, values: list[int], shape: tuple[int, ...]) -> np.ndarray:
        return np.array(values)[self.below(len(values), shape)]

    def multiples(self, largest: float, shape: tuple[int, ...]) -> np.ndarray:
        """int16 numerators of multiples of 1/UNIT, of magnitude up to `largest`."""
        top = int(largest * UNIT)
        return (self.below(2 * top + 1, shape) - top).astype(np.int16)

    def unit(self, shape: tuple[int, ...]) -> np.ndarray:
        """float32 in [0, 1), exact multiples of 2^-24."""
        return (self.below(2**24, shape) / 2.0**24).astype(np.float32)


def _arrays(draft: Draft) -> tuple[dict[str, np.ndarray], dict[str, dict[str, float]]]:
    stream = _Stream(draft.id)
    if draft.tier in ("forward", "backward"):
        return _attention_arrays(draft, stream)
    reference = NumpyAdapter()
    if draft.tier == "select":
        config = PSAConfig.from_dict(draft.parameters["config"])
        scores = draft.make_scores(stream)
        stored = {"scores": scores}
        if draft.cap_heads:
            shape = (scores.shape[0], draft.cap_heads, scores.shape[3])
            stored["cap"] = stream.choice([1, 2, 4, 8], shape).astype(np.int32)
        lengths = {name: draft.parameters[name] for name in ("q_len", "kv_len")}
        answer = (reference.select(scores, config, cap=stored.get("cap"), **lengths),)
    elif draft.tier == "table":
        stored = {"levels": stream.choice(draft.levels, draft.shape).astype(np.int32)}
        answer = reference.table(stored["levels"], **draft.parameters)
    else:
        stored = {}
        p = draft.parameters
        answer = (reference.order(p["method"], tuple(p["grid"]), p["tile"] and tuple(p["tile"])),)
    for name, array in zip(OUTPUTS[draft.tier], answer, strict=True):
        stored[f"expected_{name}"] = np.ascontiguousarray(array, np.int32)
    return stored, {}


def _attention_arrays(draft: Draft, stream: _Stream):
    b, h, kv_heads, q_len, kv_len, dim = draft.shape
    levels = draft.make_levels(stream)
    stored = {
        "q": stream.multiples(draft.q_range, (b, h, q_len, dim)),
        "k": stream.multiples(draft.k_range, (b, kv_heads, kv_len, dim)),
        "v": stream.multiples(4, (b, kv_heads, kv_len, draft.value_dim or dim)),
        "levels": levels,
    }
    if draft.tier == "backward":
        stored["dout"] = stream.multiples(1, (b, h, q_len, draft.value_dim or dim))
        if draft.with_dlse:
            stored["dlse"] = stream.multiples(1, (b, h, q_len))
    inputs = {
        name: x.astype(np.longdouble) / UNIT for name, x in stored.items() if x.dtype == np.int16
    }
    if draft.lens:
        names = ("q_lens", "kv_lens")
        stored |= {n: np.array(x, np.int32) for n, x in zip(names, draft.lens, strict=True)}
    exact = _answer(draft, inputs, levels)
    stored |= {f"expected_{name}": x.astype(np.float64) for name, x in exact.items()}
    tolerance = {
        dtype: _tolerance(draft, dtype, inputs, levels, exact, stream) for dtype in draft.dtypes
    }
    return stored, tolerance


def _answer(draft: Draft, inputs: dict, levels: np.ndarray) -> dict[str, np.ndarray]:
    call = {name: inputs[name] for name in ("q", "k", "v")} | {"levels": levels}
    if draft.tier == "backward":
        call |= {"dout": inputs["dout"], "dlse": inputs.get("dlse")}
    if draft.lens:
        call |= dict(zip(("q_lens", "kv_lens"), map(np.array, draft.lens), strict=True))
    answer = getattr(NumpyAdapter(), draft.tier)(**call, **draft.parameters, dtype="float64")
    return dict(zip(OUTPUTS[draft.tier], answer, strict=True))


def _tolerance(draft, dtype, inputs, levels, exact, stream: _Stream) -> dict[str, float]:
    """How far a sound computation at a precision may be from the exact answer.

    Measured by moving every input by one unit roundoff, keys and values of a group together as a
    rounded mean does, then four times that plus a few roundings of the answer itself; float32
    and float64 get more room for the order of their sums.
    """
    roundoff = UNIT_ROUNDOFF[dtype]
    moved = {}
    for name, x in inputs.items():
        if name in ("dout", "dlse"):
            moved[name] = x
            continue
        groups = cdiv(x.shape[2], 8)
        signs = stream.choice([-1, 1], (*x.shape[:2], groups, x.shape[3]))
        moved[name] = x * (1 + roundoff * np.repeat(signs, 8, axis=2)[:, :, : x.shape[2]])
    shifted = _answer(draft, moved, levels)
    room = 4.0 if dtype in ("float16", "bfloat16") else 32.0
    limits = {}
    for name, x in exact.items():
        finite = np.isfinite(x)
        if not finite.any():
            limits[name] = 2.0**-20
            continue
        moved_by = float(np.abs(np.where(finite, shifted[name] - np.where(finite, x, 0), 0)).max())
        size = float(np.abs(x[finite]).max())
        limit = room * (moved_by + roundoff * max(size, 2.0**-6))
        limits[name] = 2.0 ** math.ceil(math.log2(limit))
    return limits


def _npz(arrays: dict[str, np.ndarray]) -> bytes:
    """An uncompressed archive: no clock and no compressor in the bytes."""
    file = io.BytesIO()
    whole: dict[str, Any] = {name: np.ascontiguousarray(x) for name, x in arrays.items()}
    np.savez(file, **whole)
    return file.getvalue()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DATA.parent)
