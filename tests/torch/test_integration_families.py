"""What is known of other libraries' models, as data: no library is needed to read it."""

import re
from pathlib import Path

import pytest
from torch import nn

from psa_torch.integrations.families import FAMILIES, Family, family_of
from shared_specs import presets
from shared_specs.tools.cli import main

PAGE = Path(__file__).resolve().parents[2] / "docs" / "integrations.md"


def test_the_command_lists_every_family(capsys):
    assert main(["apply", "--list"]) == 0
    printed = capsys.readouterr().out
    for name, family in FAMILIES.items():
        block = re.search(rf"^{re.escape(name)}\n((?:  .*\n)+)", printed, re.MULTILINE)[1]
        for known in (*family.classes, family.dense, *family.presets):
            assert known in block, (name, known)
    assert "diffusers" in printed and "transformers" in printed


def test_the_command_does_nothing_else(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["apply"])
    assert "--list" in capsys.readouterr().err


def test_the_page_has_what_the_families_say():
    rows = re.findall(r"^\| .*? \| `([\w.-]+)` \| (.*?) \| (.*?) \|$", PAGE.read_text(), re.M)
    said = {name: (dense, re.findall(r"`(.*?)`", named)) for name, dense, named in rows}
    assert said == {n: (f.dense, list(f.presets)) for n, f in FAMILIES.items()}


def test_a_family_says_what_stays_dense_and_its_presets_exist():
    for family in FAMILIES.values():
        assert family.dense and set(family.presets) <= set(presets.names())
    of_families = {n for f in FAMILIES.values() for n in f.presets}
    assert of_families == set(presets.names()) - {"qwen2.5-vl", "accurate"}


def test_a_class_belongs_to_one_family():
    classes = [name for family in FAMILIES.values() for name in family.classes]
    assert len(classes) == len(set(classes))


def test_a_family_is_found_by_class_by_name_or_given():
    class WanTransformer3DModel(nn.Module):
        pass

    model = WanTransformer3DModel()
    own = Family((), lambda name: True, lambda model, arguments: (1, 1, 1))
    assert family_of(model, None) is FAMILIES["wan"]
    assert family_of(nn.Linear(1, 1), "ltx") is FAMILIES["ltx"]
    assert family_of(model, own) is own
    with pytest.raises(ValueError, match="no family lists Linear; known: 'wan'"):
        family_of(nn.Linear(1, 1), None)
    with pytest.raises(ValueError, match="got 'flux'"):
        family_of(model, "flux")
    with pytest.raises(TypeError, match="got int"):
        family_of(model, 3)
