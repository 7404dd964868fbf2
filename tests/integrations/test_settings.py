"""A preset brings its warm-up steps with it; exactly one of preset and configuration is given."""

import pytest

from psa_torch.integrations.settings import config_and_warmup
from shared_specs import presets
from shared_specs.config import PSAConfig


@pytest.mark.parametrize("name", presets.names())
def test_a_preset_brings_its_warm_up(name):
    found = presets.load(name)
    assert config_and_warmup(name, None) == (found.config, found.warmup_steps)


def test_some_preset_has_one():
    assert any(config_and_warmup(name, None)[1] > 0 for name in presets.names())


def test_a_configuration_has_none():
    config = PSAConfig(block_n=32)
    assert config_and_warmup(None, config) == (config, 0)


@pytest.mark.parametrize(
    ("preset", "config", "kind", "words"),
    [
        (None, None, ValueError, "exactly one"),
        ("wan2.1-14b", PSAConfig(), ValueError, "exactly one"),
        ("no such", None, ValueError, "no such"),
        (None, {"block_n": 32}, TypeError, "config must be a PSAConfig or None, got dict"),
    ],
)
def test_what_does_not_fit_is_refused(preset, config, kind, words):
    with pytest.raises(kind, match=words):
        config_and_warmup(preset, config)
