"""The build folder for Hugging Face's `kernels`, loaded offline beside the package itself."""

import importlib.util
from pathlib import Path

import pytest
import torch

import psa_torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def hub():
    spec = importlib.util.spec_from_file_location("hub_build", ROOT / "hub" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_loaded_build_is_the_package_beside_it(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    kernels = pytest.importorskip("kernels")
    assert hub.main([str(tmp_path), "--id", "_psa_test"]) == 0
    kernel = kernels.get_local_kernel(tmp_path / "build")
    assert kernel.__file__.startswith(str(tmp_path)) and kernel.__all__ == psa_torch.__all__
    assert kernel.psa_attention is not psa_torch.psa_attention
    outputs, gradients = [], []
    inputs = torch.randn(3, 1, 2, 512, 32)
    for package in (kernel, psa_torch):
        config = package.PSAConfig.preset("wan2.1-1.3b-topk", (128, 128, 29))
        q, k, v = (x.clone().requires_grad_() for x in inputs)
        out = package.psa_attention(q, k, v, config=config)
        gradients.append(torch.autograd.grad(out.square().sum(), [q, k, v]))
        outputs.append(out)
    assert torch.equal(*outputs)
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.ops._psa_test.permute is not torch.ops.psa.permute


def test_nothing_in_a_build_looks_for_the_package_by_name(hub, tmp_path):
    folders = hub.build(tmp_path, "_psa_names")
    assert [folder.name for folder in folders] == ["torch-cpu", "torch-cuda"]
    modules = list(folders[0].rglob("*.py"))
    assert len(modules) > 50
    for module in modules:
        text = module.read_text()
        assert "\nfrom psa_torch" not in text and "\nfrom shared_specs" not in text
        assert '"psa::' not in text and "torch.ops.psa" not in text
    assert (folders[1] / "shared_specs" / "presets" / "wan2.1-14b.toml").is_file()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("import psa_torch.order\n", "write `from ... import`"),
        ("from shared_specs.tools import cli\n", "is not part of the build"),
        ("from   psa_torch.order import permute\n", "no `from psa_torch.order import`"),
    ],
)
def test_what_cannot_be_moved_is_refused(hub, line, words):
    with pytest.raises(ValueError, match=words):
        hub.relocated(line, Path("psa_torch/x.py"), "_psa")


def test_imports_become_relative_whatever_their_place(hub):
    text = "def f():\n    from shared_specs.masks import density\n    return '\"psa::x'\n"
    moved = hub.relocated(text, Path("psa_torch/attention/x.py"), "_me")
    assert "    from ...shared_specs.masks import density\n" in moved and '"_me::x' in moved
