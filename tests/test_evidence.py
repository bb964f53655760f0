"""Reader inputs against a layout written token by token."""

from __future__ import annotations

import numpy as np
import pytest

from expertrag_jax import evidence
from expertrag_jax.errors import UserError


def reference(question, segments, length):
    """Writes one token after the other; when the row is full, its last token becomes the separator."""
    row = []
    for segment in [question, *segments]:
        for token in [*segment, 1]:
            if len(row) == length:
                row[-1] = 1
                return row
            row.append(token)
    return row + [0] * (length - len(row))


def random_ids(rng, most):
    return rng.integers(2, 50, size=rng.integers(0, most + 1)).tolist()


def test_known_row():
    row = evidence.assemble([7, 8], [5], [3, 4], length=9)
    assert row.dtype == np.int32
    assert row.tolist() == [7, 8, 1, 5, 1, 3, 4, 1, 0]
    assert evidence.assemble([7, 8], [5], [3, 4], length=7).tolist() == [7, 8, 1, 5, 1, 3, 1]
    assert evidence.assemble([7, 8], [5], [3, 4], length=3).tolist() == [7, 8, 1]


@pytest.mark.parametrize("ending", [[], [1], [1, 0, 0], [0]])
def test_final_eos_and_padding_of_the_question_are_dropped(ending):
    row = evidence.assemble([7, 8, *ending], [5], [3], length=8)
    assert row.tolist() == [7, 8, 1, 5, 1, 3, 1, 0]


def test_random_rows_match_the_reference():
    rng = np.random.default_rng(0)
    for _ in range(300):
        question, passages = random_ids(rng, 6), [(random_ids(rng, 3), random_ids(rng, 8)) for _ in range(3)]
        length = int(rng.integers(len(question) + 1, 40))
        segments = [segment for passage in passages for segment in passage]
        concatenated = evidence.concatenate(question, passages, length)
        assert concatenated.tolist() == reference(question, segments, length)
        one = evidence.assemble(question, *passages[0], length)
        assert one.tolist() == reference(question, passages[0], length)
    assert evidence.concatenate([5, 6], [], 4).tolist() == [5, 6, 1, 0]


@pytest.mark.parametrize("question_end", [[], [1]])
@pytest.mark.parametrize("length", [8, 13, 14, 20, 40])
def test_batch_equals_row_by_row(question_end, length):
    rng = np.random.default_rng(length)
    batch, num_passages, question_length, passage_length = 16, 3, 9, 14
    questions = np.zeros((batch, question_length), np.int32)
    passages = np.zeros((batch, num_passages, passage_length), np.int32)
    expected = np.zeros((batch, num_passages, length), np.int32)
    for b in range(batch):
        question = random_ids(rng, 7)
        tokens = question + question_end
        questions[b, : len(tokens)] = tokens
        for k in range(num_passages):
            if rng.random() < 0.2:
                continue  # absent
            title = random_ids(rng, 4)
            text = random_ids(rng, 7) + [9]
            tokens = [*title, 1, *text]
            passages[b, k, : len(tokens)] = tokens
            expected[b, k] = evidence.assemble(question, title, text, length)
    result = evidence.assemble_batch(questions, passages, length)
    assert result.dtype == np.int32
    np.testing.assert_array_equal(result, expected)
    assert (result == 0).all(axis=-1).any(), "no passage was absent"
    if length <= 14:
        assert (result[..., -1] == 1).any(), "no passage was cut"


def test_full_width_question_without_padding():
    result = evidence.assemble_batch(np.array([[4, 5, 6]]), np.array([[[7, 1, 8]]]), 9)
    assert result.tolist() == [[[4, 5, 6, 1, 7, 1, 8, 1, 0]]]


def test_a_question_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match="question of 5 tokens"):
        evidence.assemble([2, 3, 4, 5, 6], [7], [8], length=5)
    questions = np.array([[2, 3, 4, 5, 6, 1], [2, 1, 0, 0, 0, 0]])
    passages = np.full((2, 1, 3), 7)
    with pytest.raises(UserError, match="question of 5 tokens"):
        evidence.assemble_batch(questions, passages, 5)
    assert evidence.assemble_batch(questions, passages, 6)[0, 0].tolist() == [2, 3, 4, 5, 6, 1]
