"""What an implementation offers to the suite."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shared_specs.config import PSAConfig

TIERS = ("select", "table", "forward", "backward", "order")
"""Parts of the specification that can be claimed on their own; also the adapter's methods."""


class Adapter:
    """Base of adapters: override any of the five methods, in NumPy arrays.

    A method that is not overridden, or that raises NotImplementedError, is reported as skipped.
    Floating inputs of `forward` and `backward` are float32 (float64 for dtype 'float64') with
    values that float16 and bfloat16 hold exactly; `dtype` names the precision to compute in.

    Attributes:
        name: shown in reports.
    """

    name = "adapter"

    def capabilities(self) -> Mapping[str, Collection[Any]]:
        """What is supported, by the keys a case may require; a key left out has no limit.

        Keys: 'dtype' (names), 'mask_form' ('dense', 'segments'), 'head_dim', 'block_m',
        'block_n', 'levels' (of a mask, 0 included), 'value_dim' (where it is not that of keys), and
        the features 'is_causal', 'grouped', 'unequal_lengths', 'ragged', 'empty_rows', 'lse',
        'dlse' and 'lengths' ({True, False} or {False}). A method without an argument `q_lens` is
        never asked for 'lengths'.
        """
        return {}

    def select(
        self,
        scores: np.ndarray,
        config: PSAConfig,
        *,
        q_len: int,
        kv_len: int,
        cap: np.ndarray | None,
    ) -> np.ndarray:
        """Levels int `[B, H, Nq, Nk]` from scores float32 `[B, H, Nq, Nk]` (section 6)."""
        raise NotImplementedError

    def table(self, levels: np.ndarray, *, transposed: bool) -> tuple[np.ndarray, np.ndarray]:
        """(entries, counts) of a level mask (section 3)."""
        raise NotImplementedError

    def forward(
        self,
        q: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        levels: np.ndarray,
        *,
        block_m: int,
        block_n: int,
        scale: float | None,
        is_causal: bool,
        dtype: str,
        q_lens: np.ndarray | None = None,
        kv_lens: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """(out, lse) (section 4); lse may be None with capability 'lse': {False}.

        q_lens, kv_lens: int32 `[B]`, in cases that require 'lengths'; what lies past is NaN.
        """
        raise NotImplementedError

    def backward(
        self,
        q: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        levels: np.ndarray,
        dout: np.ndarray,
        dlse: np.ndarray | None,
        *,
        block_m: int,
        block_n: int,
        scale: float | None,
        is_causal: bool,
        dtype: str,
        q_lens: np.ndarray | None = None,
        kv_lens: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(dq, dk, dv) of `sum(out * dout) + sum(lse * dlse)` (section 4)."""
        raise NotImplementedError

    def order(
        self,
        method: str,
        grid: tuple[int, int, int],
        tile: tuple[int, int, int] | None,
    ) -> np.ndarray:
        """Raster index of the i-th token, for method 'Gilbert' or 'STA' (section 8)."""
        raise NotImplementedError


def load_adapter(target: str) -> Adapter:
    """The adapter that `MODULE[:OBJECT]` or `FILE.py[:OBJECT]` names.

    OBJECT is `adapter` when left out; it may be dotted and may end in `[KEY]`. A class is called
    without arguments.

    Raises:
        ImportError: the module cannot be imported.
        ValueError: the object is missing or offers none of the five methods.
    """
    source, _, attribute = target.partition(":")
    attribute = attribute or "adapter"
    if not source:
        raise ValueError(f"adapter must be MODULE[:OBJECT] or FILE.py[:OBJECT], got {target!r}")
    found = _module(source)
    path, _, key = attribute.removesuffix("]").partition("[")
    try:
        for part in path.split("."):
            found = getattr(found, part)
        found = found[key] if key else found
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{source} has no {attribute!r}; name it as MODULE:OBJECT") from error
    found = found() if isinstance(found, type) else found
    if not any(callable(getattr(found, tier, None)) for tier in TIERS):
        raise ValueError(f"{target} must have at least one of {', '.join(TIERS)}, got {found!r}")
    return found


def _module(source: str) -> Any:
    if not source.endswith(".py"):
        return importlib.import_module(source)
    spec = importlib.util.spec_from_file_location(Path(source).stem, source)
    if spec is None or spec.loader is None:
        raise ValueError(f"no adapter file {source!r}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except FileNotFoundError as error:
        raise ValueError(f"no adapter file {source!r}") from error
    return module
