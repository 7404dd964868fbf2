"""psa_torch.masks and psa_torch.table against the NumPy specification, integer by integer."""

import numpy as np
import pytest
import torch

from psa_torch.masks import density, from_segments, to_segments
from psa_torch.table import build_table
from shared_specs import masks as spec
from shared_specs import table as spec_table

SHAPES = [(1, 1, 1, 1), (2, 3, 4, 9), (1, 2, 7, 33), (1, 1, 3, 200)]


def random_levels(shape, seed, choices=(0, 1, 2, 4, 8)):
    return np.random.default_rng(seed).choice(np.array(choices, np.int32), shape)


def random_scores(shape, seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 6, shape).astype(np.float32)  # many ties
    scores[rng.random(shape) < 0.1] = np.nan
    return scores


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("choices", [(0, 1, 2, 4, 8), (1,), (0,), (0, 4)])
@pytest.mark.parametrize("with_scores", [False, True])
def test_segments_both_ways(shape, choices, with_scores):
    levels = random_levels(shape, sum(shape), choices)
    scores = random_scores(shape, 7) if with_scores else None
    want = spec.to_segments(levels, scores)
    got = to_segments(
        torch.from_numpy(levels), None if scores is None else torch.from_numpy(scores)
    )
    assert got.dtype == torch.int32
    np.testing.assert_array_equal(got.numpy(), want)
    back = from_segments(got)
    assert back.dtype == torch.int32 and back.is_contiguous()
    np.testing.assert_array_equal(back.numpy(), levels)


def test_infinite_scores_keep_their_rank():
    levels = np.ones((1, 1, 1, 4), np.int32)
    scores = np.array([[[[np.nan, 1.0, np.inf, 3e38]]]], np.float32)
    got = to_segments(torch.from_numpy(levels), torch.from_numpy(scores))
    np.testing.assert_array_equal(got.numpy(), spec.to_segments(levels, scores))
    assert got[0, 0, 0, :4].tolist() == [2, 3, 1, 0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64])
@pytest.mark.parametrize("transposed", [False, True])
def test_table_equals_the_specification(shape, dtype, transposed):
    levels = random_levels(shape, sum(shape))
    want = spec_table.build_table(levels, transposed=transposed)
    got = build_table(torch.from_numpy(levels).to(dtype), transposed=transposed)
    for x, y in zip(got, want, strict=True):
        assert x.dtype == torch.int32 and x.is_contiguous()
        np.testing.assert_array_equal(x.numpy(), y)


def test_table_of_a_strided_view():
    levels = torch.from_numpy(random_levels((2, 2, 9, 5), 3))
    view = levels.transpose(-1, -2)
    got, want = build_table(view), build_table(view.contiguous())
    assert all(torch.equal(x, y) and x.is_contiguous() for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("candidates", [None, [0, 1, 3, 9]])
def test_density(candidates):
    levels = random_levels((2, 3, 4, 9), 11)
    if candidates is not None:
        candidates = np.array(candidates, np.int32)
    want = spec.density(levels, candidates=candidates)
    got = density(
        torch.from_numpy(levels),
        candidates=None if candidates is None else torch.from_numpy(candidates),
    )
    assert isinstance(got, float) and got == pytest.approx(want, rel=1e-12) and got > 0


def test_density_without_candidates_is_zero():
    assert density(torch.ones(1, 1, 2, 3, dtype=torch.int32), candidates=torch.zeros(2)) == 0.0


def test_refusals():
    levels = torch.from_numpy(random_levels((1, 1, 2, 3), 1))
    good = to_segments(levels)
    with pytest.raises(TypeError, match="levels must be an integer tensor, got torch.float32"):
        to_segments(levels.float())
    with pytest.raises(TypeError, match="segments must be an integer tensor, got list"):
        from_segments([[0, -1, -1, -1, -1, -1]])
    with pytest.raises(ValueError, match=r"scores must have the shape of levels \(1, 1, 2, 3\)"):
        to_segments(levels, torch.ones(1, 1, 2, 4))
    bad = levels.clone()
    bad[0, 0, 1, 2] = 3
    with pytest.raises(ValueError, match=r"must be 0, 1, 2, 4 or 8, got 3 at \[0, 0, 1, 2\]"):
        to_segments(bad)
    with pytest.raises(ValueError, match="segments must be .* with Nk >= 1"):
        from_segments(good[..., :5])
    unclosed, shifted = good.clone(), good.clone()
    unclosed[0, 0, 1] = -1
    shifted[0, 0, 0, :4] = torch.tensor([-1, 0, 1, 2])
    shifted[0, 0, 0, 4:] = torch.tensor([-1, -1, -1, 0])
    for wrong, row in ((unclosed, 1), (shifted, 0)):
        with pytest.raises(ValueError, match=f"row {row} must be five segments each closed by -1"):
            from_segments(wrong)
    wrong = good.clone()
    wrong[wrong == 2] = 1
    with pytest.raises(ValueError, match=r"row 0 must name each block id 0..2 once"):
        from_segments(wrong)


@pytest.mark.parametrize("name", ["to_segments", "from_segments", "build_table"])
def test_opcheck(name):
    levels = torch.from_numpy(random_levels((1, 2, 3, 4), 1))
    arguments = {
        "to_segments": (levels, torch.rand(1, 2, 3, 4)),
        "from_segments": (to_segments(levels),),
        "build_table": (levels, True),
    }[name]
    torch.library.opcheck(getattr(torch.ops.psa, name).default, arguments)
