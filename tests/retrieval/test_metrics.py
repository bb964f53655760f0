"""Recall by hand."""

from __future__ import annotations

import numpy as np
import pytest

from expertrag_jax.errors import UserError
from expertrag_jax.retrieval.corpus import Passages, Question
from expertrag_jax.retrieval.metrics import gold_rows, index_recall, recall_at_k


def test_recall_at_k_by_hand():
    rows = np.array([[4, 2, 9], [1, 0, 3], [5, 6, -1], [7, 7, 7]])
    gold = [{9, 1}, {1}, {8}, set()]  # found third, first, never; the last question does not count
    assert recall_at_k(rows, gold, (1, 2, 3)) == {1: 1 / 3, 2: 1 / 3, 3: 2 / 3}
    with pytest.raises(ValueError, match="R@4 needs 4 results"):
        recall_at_k(rows, gold, (4,))
    with pytest.raises(ValueError, match="no question has a gold passage"):
        recall_at_k(rows, [set()] * 4, (1,))


def test_index_recall_by_hand():
    exact = np.array([[1, 2, 3, 4], [5, 6, -1, -1]])
    assert index_recall(np.array([[4, 9, 1, -1], [6, 5, 8, 7]]), exact) == pytest.approx((0.5 + 1) / 2)
    with pytest.raises(ValueError, match="cannot be compared"):
        index_recall(exact[:, :2], exact)


def test_gold_passages_must_be_in_the_corpus():
    passages = Passages(["a", "b"], ["", ""], ["", ""])
    known = Question("1", "q", ("x",), ("b",))
    assert gold_rows([known, Question("2", "q")], passages) == [{1}, set()]
    with pytest.raises(UserError, match="question '3' names the gold passage 'c'"):
        gold_rows([Question("3", "q", ("x",), ("c",))], passages)
