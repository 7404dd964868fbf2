"""The documentation's worked example runs, and the page shows the file as it is."""

from pathlib import Path

import pytest

from shared_specs.conformance import load_adapter, load_suite, run_suite
from shared_specs.conformance.runner import FAILED, PASSED, SKIPPED

DOCS = Path(__file__).parents[2] / "docs"
EXAMPLE = DOCS / "examples" / "flex_attention_adapter.py"


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_passes_what_it_claims():
    cases = [case for case in load_suite() if case.tier == "forward"]
    results = run_suite(load_adapter(str(EXAMPLE)), cases, ["float32"])
    by_status = {s: [r for r in results if r.status == s] for s in (PASSED, FAILED, SKIPPED)}
    assert not by_status[FAILED]
    assert len(by_status[PASSED]) >= 5
    assert all("adapter has" in r.message for r in by_status[SKIPPED])


def test_the_page_shows_the_example():
    example = EXAMPLE.read_text()
    assert example[example.index("class ") :].rstrip() in (DOCS / "conformance.md").read_text()
