"""How the sums of a coarse level are shared out over rounds."""

import pytest

pytest.importorskip("triton")

from psa_torch.attention.triton.coarse_gradient.rounds import Round, Rounds, share_out  # noqa: E402

BLOCK = 1000
"""Bytes of one query block of one query head."""
HEAD = 3 * 10 * BLOCK
"""Of one key head: three query heads, ten query blocks."""


def rounds(budget, heads=2, programs=3):
    shared = share_out(heads, 3, 10, BLOCK, budget, programs)
    assert shared[:2] == (heads, 10)
    return shared[2:]


@pytest.mark.parametrize(("budget", "heads"), [(2**30, 2), (2 * HEAD - 1, 1), (HEAD // 4, 1)])
def test_whole_heads_where_one_fits(budget, heads):
    assert rounds(budget) == (heads, 10)


def test_else_some_blocks_of_every_head_in_even_rounds():
    assert rounds(HEAD // 4 - 1) == (2, 1)
    # Of one head seven blocks would be less than a quarter, but that is within four budgets.
    assert rounds(7 * 3 * BLOCK, heads=1) == (1, 10)
    assert rounds(2 * 3 * BLOCK, heads=1) == (1, 2)


def test_few_heads_take_more_to_fill_the_machine_but_not_any_amount():
    assert rounds(6 * BLOCK, programs=60) == (2, 4)
    assert rounds(1, programs=60) == (2, 1)


def test_heads_share_out_evenly():
    assert rounds(4 * HEAD, heads=10) == (4, 10)
    assert rounds(6 * HEAD, heads=8) == (4, 10)


def test_rounds_cover_everything_once():
    got = list(Rounds(5, 7, 2, 3).places())
    assert got[:3] == [Round(0, 2, 0, 3), Round(0, 2, 3, 3), Round(0, 2, 6, 1)]
    assert got[-1] == Round(4, 1, 6, 1)
    covered = [
        (head, query)
        for first_head, heads, first, queries in got
        for head in range(first_head, first_head + heads)
        for query in range(first, first + queries)
    ]
    assert sorted(covered) == [(head, query) for head in range(5) for query in range(7)]
    assert list(Rounds(0, 7, 1, 7).places()) == []
