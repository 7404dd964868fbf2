"""The types of a configuration's keywords are those of its fields."""

import dataclasses
from typing import get_type_hints

from shared_specs.config import PSAConfig
from shared_specs.config_types import CallConfig, ConfigFields, Scale

FIELDS = get_type_hints(PSAConfig)


def test_the_keywords_are_the_fields():
    assert [field.name for field in dataclasses.fields(PSAConfig)] == list(FIELDS)
    assert get_type_hints(ConfigFields) == FIELDS | {"scale": Scale}
    assert FIELDS["scale"] == float | None
    assert not ConfigFields.__required_keys__


def test_what_a_call_reads_are_fields():
    read = {name: x for name, x in vars(CallConfig).items() if isinstance(x, property)}
    assert len(read) > 10
    for name, x in read.items():
        assert get_type_hints(x.fget)["return"] == FIELDS[name], name
