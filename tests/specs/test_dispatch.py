"""Which candidate runs, with what reasons, and that it is said once."""

import logging

import pytest

from shared_specs.dispatch import Announcer, choose


def against(**reasons):
    return reasons.get


@pytest.mark.parametrize(
    ("name", "reasons", "expected"),
    [
        (None, {}, ("fast", "")),
        (None, {"fast": "too old"}, ("slow", "fast cannot run: too old")),
        (
            None,
            {"fast": "too old", "slow": "too big"},
            ("plain", "fast cannot run: too old; slow cannot run: too big"),
        ),
        ("slow", {"fast": "too old"}, ("slow", "")),
    ],
)
def test_the_first_that_can_run_runs(name, reasons, expected):
    assert choose(name, ("fast", "slow", "plain"), against(**reasons)) == expected


def test_what_was_named_is_used_or_refused():
    with pytest.raises(ValueError, match="'fast' cannot run on this input: too old.*'slow'"):
        choose("fast", ("fast", "slow"), against(fast="too old"))
    with pytest.raises(ValueError, match="'slow' cannot run on this input: too big"):
        choose(None, ("fast", "slow"), against(fast="too old", slow="too big"))
    with pytest.raises(ValueError, match="one of 'fast', 'slow', got 'other'"):
        choose("other", ("fast", "slow"), against())


def test_each_thing_is_said_once(caplog):
    announce = Announcer("some_logger")
    with caplog.at_level(logging.INFO, "some_logger"):
        for why in ("a", "a", "b"):
            announce("it runs: %s", why)
        announce("it runs slowly: %s", "a", level=logging.WARNING)
        said = [(record.levelname, record.getMessage()) for record in caplog.records]
        assert said == [
            ("INFO", "it runs: a"),
            ("INFO", "it runs: b"),
            ("WARNING", "it runs slowly: a"),
        ]
        announce.forget()
        announce("it runs: %s", "a")
    assert len(caplog.records) == 4
