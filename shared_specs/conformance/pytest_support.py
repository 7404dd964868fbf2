"""The suite as a parametrised pytest test."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from shared_specs.conformance.adapter import Adapter, load_adapter
from shared_specs.conformance.flags import FLAGS
from shared_specs.conformance.runner import FAILED, SKIPPED, case_dtypes, run_case
from shared_specs.conformance.suite import DATA, load_suite


def pytest_cases(
    adapter: str | Adapter,
    *,
    tiers: Collection[str] | None = None,
    dtypes: Collection[str] | None = None,
    skip: Collection[str] = (),
    xfail: Collection[str] = (),
    folder: Any = DATA,
) -> Any:
    """A test function over every case, to assign to a `test_...` name.

    Args:
        adapter: an adapter object or `MODULE[:OBJECT]`.
        tiers, dtypes: only these; None means all.
        skip: ids of cases that are not run.
        xfail: ids of cases that are known to fail; one that passes is then an error.
        folder: directory of the cases.

    Raises:
        ValueError: `skip` or `xfail` names a case that does not exist.
    """
    import pytest

    adapter = load_adapter(adapter) if isinstance(adapter, str) else adapter
    cases = [case for case in load_suite(folder) if tiers is None or case.tier in tiers]
    unknown = sorted({*skip, *xfail} - {case.id for case in load_suite(folder)})
    if unknown:
        raise ValueError(f"skip and xfail must name cases of the suite, got {unknown}")
    parameters = []
    for case in cases:
        marks = [pytest.mark.skip(reason="skip list")] if case.id in skip else []
        if case.id in xfail:
            marks.append(pytest.mark.xfail(strict=True, reason="expected-failure list"))
        for dtype in case_dtypes(case, dtypes):
            parameters.append(pytest.param(case, dtype, marks=marks, id=f"{case.id}-{dtype}"))

    @pytest.mark.parametrize(("case", "dtype"), parameters)
    def test(case, dtype):
        result = run_case(adapter, case, dtype)
        if result.status == SKIPPED:
            pytest.skip(result.message)
        catches = "; ".join(FLAGS[flag] for flag in case.flags)
        assert result.status != FAILED, f"{result.message}. This case catches: {catches}"

    return test
