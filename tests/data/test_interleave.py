"""Interleaving: fixed period, even spread, resuming."""

import itertools

import pytest

from expertrag_jax.data.interleave import interleave, schedule
from expertrag_jax.errors import UserError


def counting(name, end=None):
    def pipeline(start_step=0):
        steps = itertools.count(start_step) if end is None else range(start_step, end)
        return ((name, step) for step in steps)

    return pipeline


def test_schedule_spreads_evenly():
    assert schedule([1, 1]).tolist() == [0, 1]
    assert schedule([1, 3]).tolist() == [1, 0, 1, 1]
    assert sorted(schedule([2, 3, 5]).tolist()) == [0] * 2 + [1] * 3 + [2] * 5


def test_resuming_gives_the_same_batches():
    mixed = interleave([(counting("a"), 1), (counting("b"), 3), (counting("c"), 2)])
    through = list(itertools.islice(mixed(0), 40))
    assert [step for name, step in through if name == "b"] == list(range(20))
    for start in (1, 5, 6, 17):
        assert list(itertools.islice(mixed(start), 10)) == through[start : start + 10]


def test_it_ends_with_the_first_pipeline_that_ends():
    batches = list(interleave([(counting("a", end=2), 1), (counting("b"), 1)])(0))
    assert batches == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]


def test_wrong_weights_are_refused():
    for wrong in ([], [(counting("a"), 0)], [(counting("a"), 0.5)]):
        with pytest.raises(UserError, match="whole number"):
            interleave(wrong)
