"""Interleaving and curricula: fixed period, even spread, stages in turn, resuming."""

import itertools

import numpy as np
import pytest

from expertrag_jax.batch import Batch
from expertrag_jax.data.interleave import Weighted, check_all, interleave, schedule
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
    for wrong in ([], [(counting("a"), 0)], [(counting("a"), 0.5)], [(counting("a"), 2), (counting("b"), -1)]):
        with pytest.raises(UserError, match="whole number"):
            interleave(wrong)


def test_a_weight_of_0_leaves_a_pipeline_out():
    def untouched(start_step):
        pytest.fail("nobody asks it")

    mixed = interleave([(counting("a"), 1), (untouched, 0), (counting("b"), 1)])
    assert list(itertools.islice(mixed(1), 3)) == [("b", 0), ("a", 1), ("b", 1)]


def test_all_that_can_check_itself_is_checked():
    class Checked:
        def __init__(self, name):
            self.check = lambda: checked.append(name)

    checked, plain = [], counting("plain")
    turns = interleave([(Checked("a"), 1), (plain, 1)])
    check_all([Weighted(Checked("b"), 2.0), turns])
    assert sorted(checked) == ["a", "b"]


def test_examples_are_of_every_pipeline_that_can_tell():
    class Telling:
        def __init__(self, width):
            self.batch = Batch(decoder_loss_weights=np.ones((2, width), np.float32))

        def example_batches(self, start_step=0):
            return [self.batch]

    turns = interleave([(Telling(3), 1), (counting("silent"), 1), (Weighted(Telling(4), 2.0), 2)])
    found = [batch.decoder_loss_weights for batch in turns.example_batches(5)]
    assert [weights.shape[1] for weights in found] == [3, 4] and found[-1].max() == 2


def test_weights_scale_the_targets_of_every_batch():
    def pipeline(start_step=0):
        for step in range(start_step, 3):
            yield Batch(decoder_loss_weights=np.full((2, 2), step, np.float32))

    weighted = [batch.decoder_loss_weights for batch in Weighted(pipeline, 8)(1)]
    assert [w.dtype for w in weighted] == [np.float32] * 2
    assert [w.max() for w in weighted] == [8, 16]
