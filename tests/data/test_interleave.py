"""Interleaving and curricula: fixed period, even spread, stages in turn, resuming."""

import itertools

import numpy as np
import pytest

from expertrag_jax.batch import Batch
from expertrag_jax.data.interleave import Curriculum, Weighted, interleave, schedule
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


def test_a_curriculum_gives_each_stage_its_steps():
    stages = Curriculum([counting("a"), counting("b"), counting("c")], [2, 3, 1])
    assert list(stages(0)) == [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("b", 2), ("c", 0)]
    assert list(stages(6)) == list(stages(60)) == []
    skipping = Curriculum([counting("a"), counting("b"), counting("c", end=2)], [1, 0, None])
    assert list(skipping(0)) == [("a", 0), ("c", 0), ("c", 1)]


def test_resuming_a_curriculum_at_any_step_gives_the_same_batches():
    mixed = interleave([(counting("b"), 1), (counting("c"), 2)])
    curriculum = Curriculum([counting("a"), mixed, counting("d")], [3, 7, None])
    through = list(itertools.islice(curriculum(0), 20))
    assert [name for name, _ in through] == [*"aaa", *"cbccbcc", *"dddddddddd"]
    for start in range(16):
        assert list(itertools.islice(curriculum(start), 4)) == through[start : start + 4]


def test_a_stage_that_ends_early_ends_the_curriculum_wherever_it_is_resumed():
    curriculum = Curriculum([counting("a", end=3), counting("b", end=9)], [5, None])
    through = list(curriculum(0))
    assert through == [("a", 0), ("a", 1), ("a", 2)]
    for start in range(5):
        assert list(curriculum(start)) == through[start:]


@pytest.mark.parametrize("steps", [[], [3], [None, 3], [3, 0.5], [-1, 3], [1, 2, 3]])
def test_steps_that_do_not_fit_the_stages_are_refused(steps):
    with pytest.raises(UserError, match="curriculum of 2 stages"):
        Curriculum([counting("a"), counting("b")], steps)
    with pytest.raises(UserError, match="curriculum of 0 stages"):
        Curriculum([], steps)


def test_all_that_can_check_itself_is_checked():
    class Checked:
        def __init__(self, name):
            self.check = lambda: checked.append(name)

    checked, plain = [], counting("plain")
    turns = interleave([(Checked("a"), 1), (plain, 1)])
    Curriculum([Weighted(Checked("b"), 2.0), turns], [3, None]).check()
    assert sorted(checked) == ["a", "b"]


def test_examples_are_of_every_stage_to_come():
    class Telling:
        def __init__(self, width):
            self.batch = Batch(decoder_loss_weights=np.ones((2, width), np.float32))

        def example_batches(self, start_step=0):
            return [self.batch]

    turns = interleave([(Telling(3), 1), (counting("silent"), 1), (Weighted(Telling(4), 2.0), 2)])
    curriculum = Curriculum([Telling(1), Telling(2), turns], [2, 3, None])

    def widths(start):
        return [batch.decoder_loss_weights.shape[1] for batch in curriculum.example_batches(start)]

    assert widths(0) == widths(1) == [1, 2, 3, 4] and widths(2) == [2, 3, 4] and widths(5) == widths(50) == [3, 4]
    ended = Curriculum([Telling(1), Telling(2), Telling(3)], [0, 3, 0])
    assert len(ended.example_batches()) == 1 and ended.example_batches(3) == []
    assert curriculum.example_batches()[-1].decoder_loss_weights.max() == 2


def test_weights_scale_the_targets_of_every_batch():
    def pipeline(start_step=0):
        for step in range(start_step, 3):
            yield Batch(decoder_loss_weights=np.full((2, 2), step, np.float32))

    weighted = [batch.decoder_loss_weights for batch in Weighted(pipeline, 8)(1)]
    assert [w.dtype for w in weighted] == [np.float32] * 2
    assert [w.max() for w in weighted] == [8, 16]
