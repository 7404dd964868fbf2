"""Every refusal names the argument, its value and what is accepted."""

import numpy as np
import pytest

from shared_specs.checks import (
    Described,
    check_blocks,
    check_flag,
    check_implementation,
    check_integer,
    check_levels_shape,
    check_qkv,
    check_scale,
    check_triple,
)

Q = Described((2, 4, 100, 64), "bfloat16", "cuda:0")
K = Described((2, 2, 130, 64), "bfloat16", "cuda:0")


def test_good_inputs_pass():
    check_qkv(Q, K, K)
    check_blocks(128, 64)
    check_scale(None)
    check_scale(0.5)
    check_flag("return_lse", True)
    check_implementation(None, ["gather"])


@pytest.mark.parametrize(
    "change, error, words",
    [
        (
            {"q": Q._replace(shape=(2, 4, 64))},
            ValueError,
            ["q must be [B, H, Lq, D]", "(2, 4, 64)"],
        ),
        ({"v": K._replace(shape=(2, 2, 131, 64))}, ValueError, ["v", "130", "131"]),
        ({"v": K._replace(shape=(2, 2, 130, 36))}, ValueError, ["dimension of v", "8", "36"]),
        ({"q": Q._replace(shape=(3, 4, 100, 64))}, ValueError, ["batch", "3", "2"]),
        ({"q": Q._replace(shape=(2, 4, 100, 32))}, ValueError, ["head dimension", "32", "64"]),
        ({"q": Q._replace(shape=(2, 3, 100, 64))}, ValueError, ["multiple", "3", "2"]),
        ({"q": Q._replace(shape=(2, 4, 0, 64))}, ValueError, ["q", "length", "0"]),
        ({"q": Q._replace(dtype="int32")}, TypeError, ["q", "int32", "bfloat16"]),
        ({"k": K._replace(dtype="float32")}, TypeError, ["one dtype", "float32"]),
        ({"k": K._replace(device="cpu")}, ValueError, ["one device", "cpu", "cuda:0"]),
        (
            {name: x._replace(shape=(*x.shape[:2], 0, 64)) for name, x in (("k", K), ("v", K))},
            ValueError,
            ["k", "length", "0"],
        ),
        (
            {n: x._replace(shape=(*x.shape[:3], 36)) for n, x in (("q", Q), ("k", K), ("v", K))},
            ValueError,
            ["head dimension", "multiple of 8", "36"],
        ),
        (
            {n: x._replace(shape=(*x.shape[:3], 264)) for n, x in (("q", Q), ("k", K), ("v", K))},
            ValueError,
            ["head dimension", "256", "264"],
        ),
    ],
)
def test_qkv(change, error, words):
    with pytest.raises(error) as caught:
        check_qkv(**{"q": Q, "k": K, "v": K, **change})
    for word in words:
        assert word in str(caught.value)


def test_levels_form_follows_from_the_shape():
    dense, segments = Described((2, 4, 1, 3), "int32", "cuda:0"), (2, 4, 1, 8)
    kwargs = {"block_m": 128, "block_n": 64}
    assert check_levels_shape(dense, Q, K, **kwargs) == "dense"
    assert check_levels_shape(dense._replace(shape=segments), Q, K, **kwargs) == "segments"
    with pytest.raises(ValueError, match=r"\(2, 4, 1, 3\).*\(2, 4, 1, 8\).*got \(2, 4, 1, 4\)"):
        check_levels_shape(dense._replace(shape=(2, 4, 1, 4)), Q, K, **kwargs)
    with pytest.raises(TypeError, match="float32"):
        check_levels_shape(dense._replace(dtype="float32"), Q, K, **kwargs)
    with pytest.raises(ValueError, match="device"):
        check_levels_shape(dense._replace(device="cpu"), Q, K, **kwargs)


@pytest.mark.parametrize(
    "call, error, word",
    [
        (lambda: check_blocks(96, 64), ValueError, "block_m.*96"),
        (lambda: check_blocks(64, True), ValueError, "block_n.*True"),
        (lambda: check_scale("1"), TypeError, "scale.*'1'"),
        (lambda: check_scale(float("nan")), ValueError, "scale.*nan"),
        (lambda: check_flag("is_causal", 1), TypeError, "is_causal.*1"),
        (
            lambda: check_implementation("cuda", ["gather", "triton"]),
            ValueError,
            "'triton'.*'cuda'",
        ),
    ],
)
def test_scalars(call, error, word):
    with pytest.raises(error, match=word):
        call()


def test_integers_and_triples_come_back_as_python_has_them():
    assert type(check_integer("step", np.int64(3))) is int
    assert check_triple("grid", [np.int32(2), 3, 4], "three") == (2, 3, 4)
    for value in (True, 1.0, "1", None, np.ones((), np.int32)):
        with pytest.raises(TypeError, match="step must be an integer,.* got"):
            check_integer("step", value)
        with pytest.raises(ValueError, match="grid must be three, three integers of at least 1"):
            check_triple("grid", (2, 3, value), "three")
    with pytest.raises(ValueError, match="count must be at least 2, got 1"):
        check_integer("count", 1, 2)
