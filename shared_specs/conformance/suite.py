"""Loading the committed cases. Nothing in a case is executed; every array is checked."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shared_specs.conformance.adapter import TIERS
from shared_specs.conformance.flags import FLAGS

SCHEMA = 1
DATA = Path(__file__).parent / "v2"
FIELDS = (
    "id",
    "file",
    "sha256",
    "tier",
    "rule",
    "flags",
    "requires",
    "parameters",
    "tolerance",
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One question with its answer.

    Attributes:
        id: unique name.
        file, sha256: where its arrays are, and their checksum.
        tier: which method of an adapter answers it.
        rule: section of the specification that it exercises.
        flags: mistakes that it is known to catch, keys of `flags.FLAGS`.
        requires: feature -> values that an adapter needs (see `Adapter.capabilities`).
        parameters: keyword arguments of the method, as plain data.
        tolerance: dtype -> {output: largest absolute error}; empty for exact cases.
        folder: directory of `file`.
    """

    id: str
    file: str
    sha256: str
    tier: str
    rule: str
    flags: tuple[str, ...]
    requires: Mapping[str, list[Any]]
    parameters: Mapping[str, Any]
    tolerance: Mapping[str, Mapping[str, float]]
    folder: Path = DATA

    def arrays(self) -> dict[str, np.ndarray]:
        """The case's arrays by name.

        Raises:
            ValueError: the file is not the one the index describes, or is not a plain archive.
        """
        data = (self.folder / self.file).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        if digest != self.sha256:
            raise ValueError(
                f"case {self.id}: sha256 of {self.file} is {digest}, the index says {self.sha256}"
            )
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as archive:
                stored = {name: archive[name] for name in archive.files}
        except (ValueError, EOFError, OSError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(f"case {self.id}: {self.file} is not a plain .npz: {error}") from error
        return {name: _decoded(name, array) for name, array in stored.items()}


def _decoded(name: str, array: np.ndarray) -> np.ndarray:
    """Inputs of attention are stored as int16 multiples of 1/64."""
    if array.dtype == np.int16:
        return array.astype(np.float32) / 64
    return array


def load_suite(folder: str | Path = DATA) -> list[Case]:
    """Every case of an index, after those of the suites beside it that it contains.

    Args:
        folder: a directory with `index.json` and the files it names.

    Raises:
        ValueError: the index is malformed, of another schema, names a file outside `folder`, or
            contains what is no other suite beside it.
    """
    folder = Path(folder)
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{folder / 'index.json'} is not valid JSON: {error}") from error
    if not isinstance(index, dict) or index.get("schema") != SCHEMA:
        found = index.get("schema") if isinstance(index, dict) else type(index).__name__
        raise ValueError(f"index schema must be {SCHEMA}, got {found!r}")
    if not isinstance(index.get("cases"), list):
        raise ValueError("index must have a list 'cases'")
    contained = index.get("contains", [])
    names = [x for x in contained if isinstance(x, str)] if isinstance(contained, list) else []
    if names != contained or any(Path(x).name != x or x == folder.name for x in names):
        raise ValueError(f"contains must list folders beside the index, got {contained!r}")
    cases = [case for name in names for case in load_suite(folder.parent / name)]
    cases += [_case(entry, folder) for entry in index["cases"]]
    ids = [case.id for case in cases]
    if len(set(ids)) != len(ids):
        raise ValueError(f"index repeats ids: {sorted({i for i in ids if ids.count(i) > 1})}")
    return cases


def _case(entry: Any, folder: Path) -> Case:
    if not isinstance(entry, dict) or sorted(entry) != sorted(FIELDS):
        found = sorted(entry) if isinstance(entry, dict) else entry
        raise ValueError(f"a case must have exactly the fields {', '.join(FIELDS)}, got {found}")
    name = entry["id"]
    for field in ("id", "file", "sha256", "tier", "rule"):
        if not isinstance(entry[field], str):
            raise ValueError(f"case {name!r}: {field} must be a string, got {entry[field]!r}")
    if Path(entry["file"]).name != entry["file"] or not entry["file"].endswith(".npz"):
        raise ValueError(
            f"case {name}: file must be a .npz beside the index, got {entry['file']!r}"
        )
    if entry["tier"] not in TIERS:
        raise ValueError(f"case {name}: tier must be one of {TIERS}, got {entry['tier']!r}")
    if not isinstance(entry["flags"], list) or any(flag not in FLAGS for flag in entry["flags"]):
        raise ValueError(f"case {name}: flags must be known mistakes, got {entry['flags']!r}")
    for field in ("requires", "parameters", "tolerance"):
        if not isinstance(entry[field], dict):
            raise ValueError(f"case {name}: {field} must be an object, got {entry[field]!r}")
    if not all(isinstance(values, list) for values in entry["requires"].values()):
        raise ValueError(f"case {name}: requires must map to lists, got {entry['requires']!r}")
    if not all(isinstance(limits, dict) for limits in entry["tolerance"].values()):
        raise ValueError(f"case {name}: tolerance must map to objects, got {entry['tolerance']!r}")
    return Case(**{**entry, "flags": tuple(entry["flags"])}, folder=folder)
