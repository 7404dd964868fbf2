"""What every integration is given to run with: a preset's name or a configuration."""

from shared_specs import presets
from shared_specs.config import PSAConfig, check_config


def config_and_warmup(preset: str | None, config: PSAConfig | None) -> tuple[PSAConfig, int]:
    """The configuration, and the warm-up steps that go with it (0 beside a configuration).

    Raises:
        TypeError: config is no `PSAConfig`.
        ValueError: not exactly one of the two is given, or there is no such preset.
    """
    if (preset is None) == (config is None):
        raise ValueError("give exactly one of preset and config")
    if preset is not None:
        found = presets.load(preset)
        return found.config, found.warmup_steps
    return check_config(config), 0
