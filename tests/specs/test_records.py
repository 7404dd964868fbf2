"""Density records, stored as JSON lines."""

import json

import numpy as np
import pytest

from shared_specs.records import DensityRecord, DensityRecords


def make(rng, layers=("blocks.0", "blocks.1"), steps=(0, 1, 4), heads=3):
    return DensityRecords(
        DensityRecord(layer, step, head, float(rng.random()))
        for step in steps
        for layer in layers
        for head in range(heads)
    )


def test_json_lines_both_ways(rng, tmp_path):
    records = make(rng)
    path = tmp_path / "density.jsonl"
    records.to_jsonl(path)
    lines = path.read_text().splitlines()
    assert len(lines) == len(records) == 18
    assert set(json.loads(lines[0])) == {"layer", "step", "head", "density"}
    assert DensityRecords.from_jsonl(path) == records


def test_a_broken_line_is_named(rng, tmp_path):
    path = tmp_path / "density.jsonl"
    make(rng).to_jsonl(path)
    for broken in ("{", '{"layer": "a"}', '{"layer":"a","step":0,"head":0,"density":1,"x":2}'):
        path.write_text(path.read_text().splitlines()[0] + "\n" + broken + "\n")
        with pytest.raises(ValueError, match="line 2 is not a density record"):
            DensityRecords.from_jsonl(path)


def test_means_by_layer_and_step(rng):
    records = make(rng)
    only_first = DensityRecords(r for r in records if (r.layer, r.step) != ("blocks.1", 4))
    layers, steps, density = only_first.by_layer_and_step()
    assert layers == ["blocks.0", "blocks.1"] and steps == [0, 1, 4]
    expected = np.mean([r.density for r in records if (r.layer, r.step) == ("blocks.0", 1)])
    np.testing.assert_allclose(density[0][1], expected)
    assert np.isnan(density[1][2]) and np.isfinite(density[1][1])
