"""The conformance suite and the parity workloads on a CUDA device, one test for each case, so that
`pytest -m gpu -n 8 --maxschedchunk 1` spreads them and a run that is cut short says what it did."""

import pytest

from psa_jax import conformance as jax_adapters
from psa_torch import conformance as torch_adapters
from shared_specs.conformance import load_suite, run_suite
from shared_specs.conformance.runner import FAILED, PASSED
from shared_specs.tools import parity

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

ADAPTERS = [*torch_adapters.adapters("gpu"), *jax_adapters.adapters("gpu")]
WORKLOADS = [workload for size in parity.SIZES.values() for workload in size]


# First: they compile longest, and a run should not end with most workers idle.
@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_parity(workload):
    """Every implementation within twice the error of plain attention, levels equal from equal
    scores."""
    found, missing = parity.find_adapters("gpu")
    assert not missing
    assert not parity.failures(parity.run_parity(found, [workload]))


@pytest.mark.parametrize("case", load_suite(), ids=lambda case: case.id)
@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.name)
def test_case(adapter, case):
    assert adapter.unavailable() is None
    results = run_suite(adapter, [case])
    assert not [f"[{r.dtype}] {r.message}" for r in results if r.status == FAILED]
    if not any(r.status == PASSED for r in results):
        pytest.skip(results[0].message)
