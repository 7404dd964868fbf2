"""Heads over ranks: every row once, evenly, query heads where their keys are."""

import itertools

import pytest

from shared_specs.head_plan import head_plan


def possible(units, group, world):
    return units >= world or (world % units == 0 and group % (world // units) == 0)


CASES = list(itertools.product((1, 2, 3), (1, 2, 6), (1, 2, 4), (1, 2, 3, 4, 8)))


@pytest.mark.parametrize(("batch", "kv_heads", "group", "world"), CASES)
def test_every_row_is_computed_once_beside_its_keys(batch, kv_heads, group, world):
    heads = kv_heads * group
    if not possible(batch * kv_heads, group, world):
        with pytest.raises(ValueError, match=f"{world} ranks cannot share"):
            head_plan(batch, heads, kv_heads, world)
        return
    plan = head_plan(batch, heads, kv_heads, world)
    assert len(plan.q_rows) == len(plan.kv_rows) == world
    assert list(itertools.chain(*plan.q_rows)) == list(range(batch * heads))
    assert sorted(set(itertools.chain(*plan.kv_rows))) == list(range(batch * kv_heads))
    for q_rows, kv_rows in zip(plan.q_rows, plan.kv_rows, strict=True):
        # What a rank gets is grouped attention of its own: head h reads key head h // local group.
        assert len(q_rows) % len(kv_rows) == 0
        local = len(q_rows) // len(kv_rows)
        for place, row in enumerate(q_rows):
            entry, head = divmod(row, heads)
            assert kv_rows[place // local] == entry * kv_heads + head // group
    sizes = [len(rows) for rows in plan.kv_rows]
    assert max(sizes) - min(sizes) <= 1
    assert plan.shares_keys == (batch * kv_heads < world)


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ((1, 4, 4, 2.0), TypeError, "world must be an integer, got 2.0"),
        ((True, 4, 4, 2), TypeError, "batch"),
        ((1, 0, 4, 2), ValueError, "heads must be at least 1"),
        ((1, 6, 4, 2), ValueError, "heads must be a multiple of kv_heads"),
    ],
)
def test_bad_numbers_are_refused_by_name(arguments, kind, words):
    with pytest.raises(kind, match=words):
        head_plan(*arguments)
