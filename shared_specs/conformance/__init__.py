"""Conformance suite: does an implementation compute pyramid sparse attention, and if not, which
rule does it break?

Cases are data (`v1/`), an implementation is an `Adapter`, `run_suite` compares them.
`psa conformance run MODULE[:OBJECT]` is the same from a shell, `pytest_cases` from pytest.
"""

from shared_specs.conformance.adapter import Adapter, load_adapter
from shared_specs.conformance.pytest_support import pytest_cases
from shared_specs.conformance.runner import Result, run_case, run_suite
from shared_specs.conformance.suite import Case, load_suite

__all__ = [
    "Adapter",
    "Case",
    "Result",
    "load_adapter",
    "load_suite",
    "pytest_cases",
    "run_case",
    "run_suite",
]
