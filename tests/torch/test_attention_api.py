"""`psa_torch.sparse_attention`: checks, the choice of an implementation, autocast."""

import logging
import subprocess
import sys

import pytest
import torch

from psa_torch import sparse_attention
from psa_torch.attention import IMPLEMENTATIONS, choose, implementations
from shared_specs.masks import to_segments
from tests.torch.attention_contract import Case

BLOCKS = {"block_m": 64, "block_n": 64}


@pytest.fixture
def inputs(rng):
    return Case().inputs(rng)


def call(inputs, **changes):
    arguments = {**inputs._asdict(), **BLOCKS}
    del arguments["dout"], arguments["dlse"]
    return sparse_attention(**{**arguments, **changes})


def test_lse_is_returned_on_request_only(inputs):
    out = call(inputs)
    again, lse = call(inputs, return_lse=True)
    assert isinstance(out, torch.Tensor) and torch.equal(out, again)
    assert lse.dtype == torch.float32 and not lse.requires_grad


def test_scale_defaults_to_the_inverse_root_of_d(inputs):
    assert torch.equal(call(inputs), call(inputs, scale=32**-0.5))
    assert not torch.equal(call(inputs), call(inputs, scale=1))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int64])
def test_levels_of_any_integer_type(inputs, dtype):
    assert torch.equal(call(inputs), call(inputs, levels=inputs.levels.to(dtype)))


BAD = [
    ("q of rank 3", lambda i: {"q": i.q[0]}, ValueError, "q must be .*shape"),
    ("q not a tensor", lambda i: {"q": i.q.numpy()}, TypeError, "q must be a torch.Tensor"),
    ("heads", lambda i: {"k": i.k.repeat(1, 2, 1, 1), "v": i.v.repeat(1, 2, 1, 1)},
     ValueError, "heads of q must be a multiple"),
    ("batch", lambda i: {"q": i.q[:1]}, ValueError, "batch"),
    ("v unlike k", lambda i: {"v": i.v[:, :, 1:]}, ValueError, "v must have the shape of k"),
    ("D", lambda i: {n: getattr(i, n)[..., :12] for n in "qkv"}, ValueError, "multiple of 8.*12"),
    ("D too large", lambda i: {n: getattr(i, n).repeat(1, 1, 1, 9) for n in "qkv"},
     ValueError, "256.*288"),
    ("dtype", lambda i: {n: getattr(i, n).int() for n in "qkv"}, TypeError, "q must be .*int32"),
    ("mixed dtypes", lambda i: {"k": i.k.double()}, TypeError, "one dtype.*float64"),
    ("mixed devices", lambda i: {"v": i.v.to("meta")}, ValueError, "one device.*meta"),
    ("no keys", lambda i: {"k": i.k[:, :, :0], "v": i.v[:, :, :0]}, ValueError, "at least 1"),
    ("levels not a tensor", lambda i: {"levels": i.levels.tolist()}, TypeError, "levels must be"),
    ("levels float", lambda i: {"levels": i.levels.float()}, TypeError, "integer.*float32"),
    ("levels shape", lambda i: {"levels": i.levels[..., 1:]}, ValueError, r"levels must be \(2, 2"),
    ("levels device", lambda i: {"levels": i.levels.to("meta")}, ValueError, "device of q"),
    ("level 3", lambda i: {"levels": i.levels.clamp(min=3)}, ValueError, "0, 1, 2, 4 or 8, got"),
    ("level -1", lambda i: {"levels": i.levels - 1}, ValueError, "0, 1, 2, 4 or 8, got"),
    ("level beyond int32", lambda i: {"levels": i.levels.long() + 2**32}, ValueError, "0, 1, 2, 4"),
    ("segments left open", lambda i: {"levels": segments(i).clamp(min=0)}, ValueError, "closed"),
    ("block_m", lambda i: {"block_m": 32}, ValueError, "block_m must be one of.*32"),
    ("block_n", lambda i: {"block_n": 256}, ValueError, "block_n must be one of.*256"),
    ("scale", lambda i: {"scale": float("nan")}, ValueError, "scale must be finite"),
    ("scale tensor", lambda i: {"scale": torch.tensor(1)}, TypeError, "scale must be"),
    ("is_causal", lambda i: {"is_causal": 1}, TypeError, "is_causal must be True or False"),
    ("return_lse", lambda i: {"return_lse": None}, TypeError, "return_lse must be True or False"),
    ("implementation", lambda i: {"implementation": "cuda"}, ValueError, "'triton', 'gather'"),
]  # fmt: skip


def segments(inputs):
    return torch.from_numpy(to_segments(inputs.levels.numpy()))


@pytest.mark.parametrize(
    ("change", "error", "message"), [c[1:] for c in BAD], ids=[c[0] for c in BAD]
)
def test_bad_input_is_refused(inputs, change, error, message, monkeypatch):
    def no_work(*args, **kwargs):
        raise AssertionError("work was started")

    monkeypatch.setattr(IMPLEMENTATIONS["gather"], "forward", no_work)
    with pytest.raises(error, match=message):
        call(inputs, **change(inputs))


class TestChoice:
    @pytest.fixture(autouse=True)
    def nothing_announced(self):
        implementations.announce.forget()

    def test_cpu_takes_gather_and_says_so_once(self, inputs, caplog):
        with caplog.at_level(logging.INFO, "psa_torch"):
            call(inputs)
            call(inputs)
        (record,) = [r for r in caplog.records if r.name == "psa_torch"]
        assert "gather" in record.getMessage() and "cpu" in record.getMessage()

    def test_a_named_implementation_is_used_without_a_word(self, inputs, caplog, monkeypatch):
        used = []
        forward = IMPLEMENTATIONS["gather"].forward

        def record(*args, **kwargs):
            used.append(kwargs)
            return forward(*args, **kwargs)

        monkeypatch.setattr(IMPLEMENTATIONS["gather"], "forward", record)
        with caplog.at_level(logging.INFO, "psa_torch"):
            call(inputs, implementation="gather")
        assert used and not caplog.records

    def test_a_named_implementation_is_refused_with_the_reason(self, inputs, monkeypatch):
        monkeypatch.setattr(IMPLEMENTATIONS["gather"], "unsupported", lambda *a: "it is Tuesday")
        with pytest.raises(ValueError, match="'gather' cannot run on this input: it is Tuesday"):
            call(inputs, implementation="gather")
        with pytest.raises(ValueError, match="it is Tuesday"):
            call(inputs)

    def test_cuda_takes_triton_where_it_can(self, caplog, monkeypatch):
        class Cuda:
            is_cuda = True
            device = torch.device("cuda", 0)
            dtype = torch.bfloat16
            shape = (1, 1, 128, 64)

        x = Cuda()
        triton = IMPLEMENTATIONS["triton"]
        with caplog.at_level(logging.INFO, "psa_torch"):
            monkeypatch.setattr(triton, "unsupported", lambda *a: None)
            assert choose(None, x, x, x, **BLOCKS) == "triton"
            monkeypatch.setattr(triton, "unsupported", lambda *a: "too old a GPU")
            for _ in range(2):
                assert choose(None, x, x, x, **BLOCKS) == "gather"
        first, second = caplog.records
        assert first.levelno == logging.INFO
        assert second.levelno == logging.WARNING and "too old a GPU" in second.getMessage()
        assert "makes the host wait" in second.getMessage()

    def test_triton_missing_is_a_reason(self, inputs, monkeypatch):
        monkeypatch.setattr(implementations.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ValueError, match="triton is not installed"):
            call(inputs, implementation="triton")


class TestAutocast:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_casts_as_scaled_dot_product_attention_does(self, inputs, dtype):
        q, k, v = inputs[:3]
        with torch.autocast("cpu", dtype=dtype):
            out, lse = call(inputs, return_lse=True)
            dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            mixed = call(inputs, q=q.to(dtype))
        assert out.dtype == dense.dtype == mixed.dtype == dtype
        assert lse.dtype == torch.float32
        lowered = inputs._replace(q=q.to(dtype), k=k.to(dtype), v=v.to(dtype))
        assert torch.equal(out, call(lowered))

    def test_float64_stays(self, inputs):
        doubles = [x.double() for x in inputs[:3]]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = call(inputs._replace(q=doubles[0], k=doubles[1], v=doubles[2]))
        assert out.dtype == torch.float64

    def test_gradients_return_in_the_dtype_of_the_inputs(self, inputs):
        leaves = [x.clone().requires_grad_() for x in inputs[:3]]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = call(inputs._replace(q=leaves[0], k=leaves[1], v=leaves[2]))
            inside = torch.autograd.grad(out, leaves, inputs.dout.to(out.dtype), retain_graph=True)
        outside = torch.autograd.grad(out, leaves, inputs.dout.to(out.dtype))
        for x, y in zip(inside, outside, strict=True):
            assert x.dtype == torch.float32
            assert torch.equal(x, y), "autocast reached into the backward pass"


def test_without_torch_the_extra_is_named():
    script = """
import sys
sys.modules["torch"] = None
try:
    import psa_torch
except ImportError as error:
    assert "pip install pyramid-sparse-attention[torch]" in str(error), error
else:
    raise SystemExit("imported without torch")
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_import_loads_no_kernel():
    script = """
import sys
import psa_torch
loaded = set(sys.modules)
assert "psa_torch.attention.gather" in loaded
assert "psa_torch.attention.triton" not in loaded
assert "jax" not in loaded and "flax" not in loaded
"""
    subprocess.run([sys.executable, "-c", script], check=True)
