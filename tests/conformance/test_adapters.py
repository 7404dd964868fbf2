"""The adapters that ship, against the suite. Interpreters and compilers are slow: they take a
sample here, the whole suite under the marker `slow`."""

import pytest

from psa_jax import conformance as jax_adapters
from psa_jax.attention import mosaic
from psa_torch import conformance as torch_adapters
from shared_specs.conformance import load_suite, run_suite
from shared_specs.conformance.runner import FAILED, PASSED, SKIPPED

SUITE = load_suite()
EXACT = [case for case in SUITE if not case.tolerance]
SMOOTH = [case for case in SUITE if case.tolerance]


def assert_conforms(adapter, cases, dtypes=None, at_least=1):
    results = run_suite(adapter, cases, dtypes)
    failed = [f"{r.case} [{r.dtype}]: {r.message}" for r in results if r.status == FAILED]
    assert not failed, "\n".join(failed)
    passed = sum(r.status == PASSED for r in results)
    assert passed >= at_least, [r.message for r in results if r.status == SKIPPED]


def test_torch_gather_passes_the_whole_suite():
    assert_conforms(torch_adapters.TorchAdapter("gather"), SUITE, at_least=400)


@pytest.mark.parametrize("start", range(4))
def test_torch_triton_sample(start):
    adapter = torch_adapters.TorchAdapter("triton", torch_adapters.triton.device.type)
    cases = SMOOTH[3 + 4 * start :: 16]
    assert_conforms(
        adapter, cases, [("float32", "float16", "bfloat16")[start % 3]], len(cases) // 2
    )


NEW = [case for case in SUITE if {"value_dim", "lengths"} & set(case.requires)]


def test_torch_triton_on_lengths_and_values_of_another_dimension():
    adapter = torch_adapters.TorchAdapter("triton", torch_adapters.triton.device.type)
    assert_conforms(adapter, NEW, ["float32"], len(NEW))


@pytest.mark.parametrize(
    "adapter", [torch_adapters.gather, jax_adapters.gather], ids=["torch", "jax"]
)
def test_gather_on_lengths_and_values_of_another_dimension(adapter):
    of_jax = adapter is jax_adapters.gather
    cases = [case for case in NEW if not of_jax or "lengths" not in case.requires]
    assert_conforms(adapter, cases, ["float32"], len(cases))
    with_lengths = [case for case in NEW if "lengths" in case.requires]
    if of_jax:  # it has no lengths yet, and says so
        results = run_suite(adapter, with_lengths, ["float32"])
        assert {result.status for result in results} == {SKIPPED}


@pytest.mark.slow
def test_torch_triton_passes_the_whole_suite():
    assert_conforms(torch_adapters.TorchAdapter("triton"), SMOOTH, at_least=250)


def test_jax_gather_sample():
    adapter = jax_adapters.JaxAdapter("gather")
    assert_conforms(adapter, EXACT[::5], at_least=10)
    assert_conforms(adapter, SMOOTH[1::9], ["float32"], at_least=8)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_jax_gather_passes_the_whole_suite():
    assert_conforms(jax_adapters.JaxAdapter("gather"), SUITE, at_least=400)


@pytest.mark.parametrize("case", ["forward-dim-64", "forward-dim-128-causal", "backward-level-8"])
def test_jax_mosaic_sample(case):
    adapter = jax_adapters.JaxAdapter("mosaic", context=mosaic.interpreted)
    assert_conforms(adapter, [c for c in SUITE if c.id == case], ["bfloat16"])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_jax_mosaic_passes_what_it_claims():
    adapter = jax_adapters.JaxAdapter("mosaic", context=mosaic.interpreted)
    assert_conforms(adapter, SMOOTH, ["bfloat16"], at_least=80)
