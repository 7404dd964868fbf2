"""Density records of a video model: what each head of each layer computed at each step."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self


@dataclasses.dataclass(frozen=True)
class DensityRecord:
    """Density of one head in one call (specification, section 9); 1.0 is dense.

    Attributes:
        layer: the layer's name.
        step: the denoising step, from 0.
        head: the query head, from 0.
        density: mean over the batch, in [0, 1].
    """

    layer: str
    step: int
    head: int
    density: float


class DensityRecords:
    """A list of `DensityRecord`, to store; `shared_specs.tools.figures.plot_density` draws it."""

    def __init__(self, records: Iterable[DensityRecord] = ()):
        self._records = list(records)

    def __iter__(self) -> Iterator[DensityRecord]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DensityRecords) and self._records == other._records

    def to_jsonl(self, path: str | Path) -> None:
        """One JSON object per line: layer, step, head, density."""
        lines = (json.dumps(dataclasses.asdict(record)) + "\n" for record in self)
        Path(path).write_text("".join(lines), encoding="utf-8")

    @classmethod
    def from_jsonl(cls, path: str | Path) -> Self:
        """Read what `to_jsonl` wrote.

        Raises:
            ValueError: a line is not such a record; the message names the line.
        """
        records = []
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
            try:
                records.append(DensityRecord(**json.loads(line)))
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"{path}, line {number} is not a density record: {error}"
                ) from None
        return cls(records)

    def by_layer_and_step(self) -> tuple[list[str], list[int], list[list[float]]]:
        """Layers in order of appearance, steps ascending, and `density[layer][step]`.

        The density is the mean over heads and calls; NaN where a layer has no call at a step.
        """
        layers = list(dict.fromkeys(record.layer for record in self))
        steps = sorted({record.step for record in self})
        cells: dict[tuple[str, int], list[float]] = {}
        for record in self:
            cells.setdefault((record.layer, record.step), []).append(record.density)
        density = [
            [
                sum(cell) / len(cell) if (cell := cells.get((layer, step))) else float("nan")
                for step in steps
            ]
            for layer in layers
        ]
        return layers, steps, density
