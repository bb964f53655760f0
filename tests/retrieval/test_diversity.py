"""The alarm for retrieval that gives every question the same passages."""

import numpy as np
import pytest

from expertrag_jax.retrieval.diversity import RetrievalCollapse


def feed(alarm, rows_of, questions, batch=10):
    """Warnings of batches of ``batch`` questions, named by number."""
    found = []
    for start in range(0, questions, batch):
        names = range(start, start + batch)
        found.append(alarm.observe(names, np.array([rows_of(name) for name in names])))
    return [warning for warning in found if warning]


def spread(question):
    return [3 * question % 500, (3 * question + 1) % 500, (3 * question + 2) % 500]


def test_the_same_passages_for_every_question_raise_the_alarm_once_until_it_recovers():
    alarm = RetrievalCollapse(passages=1000, window=40)
    assert not feed(alarm, spread, 100)
    assert alarm.diversity() == pytest.approx(1.0)  # no two questions of the window share one
    warnings = feed(alarm, lambda question: [7, 8, 9], 200)
    assert len(warnings) == 1 and "got nearly the same passages" in warnings[0]
    assert alarm.diversity() == pytest.approx(0.0, abs=1e-6)
    assert not feed(alarm, spread, 100)
    assert len(feed(alarm, lambda question: [9, 7, 8], 200)) == 1


def test_diversity_is_the_entropy_between_its_bounds():
    """Two groups of questions, each with its own K passages, in a window of 8: log 2 of log 8."""
    alarm = RetrievalCollapse(passages=1000, window=8)
    alarm.observe(range(8), np.array([[0, 1] if question % 2 else [2, 3] for question in range(8)]))
    assert alarm.diversity() == pytest.approx(np.log(2) / np.log(8))


def test_one_question_asked_often_is_no_collapse():
    alarm = RetrievalCollapse(passages=1000, window=40)
    for _ in range(50):
        assert alarm.observe(["the same"] * 10, np.array([[1, 2]] * 10)) is None
    assert alarm.diversity() is None
    assert RetrievalCollapse(passages=2).observe([1, 2], np.array([[0, 1], [1, 0]])) is None  # no other passages


def test_absent_passages_are_left_out():
    alarm = RetrievalCollapse(passages=1000, window=4)
    alarm.observe(range(4), np.array([[question, -1] for question in range(4)]))
    assert alarm.diversity() == pytest.approx((np.log(4) - np.log(2)) / (np.log(8) - np.log(2)))
