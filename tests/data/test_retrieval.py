"""Retrieval inside a task over a real index directory and cache."""

import numpy as np
import pytest
import tensorflow as tf

from expertrag_jax.data.pipeline import Pipeline
from expertrag_jax.data.retrieval import Retrieve, split_passage
from expertrag_jax.errors import UserError
from expertrag_jax.retrieval.cache import RetrievalCache
from expertrag_jax.retrieval.corpus import Passages
from expertrag_jax.retrieval.index import make_index, open_index, write_index
from expertrag_jax.retrieval.retriever import Retriever, tokenize_passages

LENGTHS = {"inputs": 40, "targets": 8, "query": 40, "passages": 48}


@pytest.fixture
def bm25(vocabulary, tmp_path):
    passages = Passages(
        [f"p{i}" for i in range(13)],
        ["red", "green", "blue", "amber", *[""] * 9],
        ["stone river", "cloud lamp", "garden north", "south winter", *["summer copper"] * 9],
    )
    tokens = tokenize_passages(passages, vocabulary.encode, 24)
    index = make_index("bm25").build(passages, None)
    write_index(tmp_path / "index", index, passages, passage_tokens=tokens)
    return Retriever(open_index(tmp_path / "index"), cache=RetrievalCache(tmp_path / "cache.sqlite"))


def one_pass(task):
    return list(Pipeline(task, LENGTHS, 37, repeat=False, shuffle=False, process_index=0, process_count=1)(0))


def test_a_real_index_and_its_cache(questions, bm25, monkeypatch):
    task = questions.task("both_arms", retriever=bm25, num_passages=3)
    (batch,) = one_pass(task)
    texts = [record["question"] for record in questions.records]
    expected = bm25.retrieve(texts, None, 3)
    np.testing.assert_array_equal(batch.passage_rows, expected.rows)
    assert (batch.passage_rows == -1).any()  # a question that shares no word with some third passage
    absent = batch.passage_rows == -1
    assert not batch.passage_tokens[absent].any() and batch.passage_tokens[~absent].any(axis=-1).all()
    known = np.array([bool(record["gold"]) for record in questions.records])
    assert np.isnan(batch.passage_relevance[~known]).all()
    for row, record in enumerate(questions.records):
        if record["gold"]:
            hit = [r >= 0 and f"p{r}" in record["gold"] for r in batch.passage_rows[row]]
            np.testing.assert_array_equal(batch.passage_relevance[row], hit)

    def forbidden(*_):
        raise AssertionError("the cache knows every question")

    monkeypatch.setattr(bm25.loaded.index, "search", forbidden)
    (again,) = one_pass(questions.task("both_arms", retriever=bm25, num_passages=3))
    np.testing.assert_array_equal(again.passage_tokens, batch.passage_tokens)
    np.testing.assert_array_equal(again.passage_scores, batch.passage_scores)


def test_an_index_without_tokens_is_refused(questions, retriever, monkeypatch):
    retrieve = retriever.retrieve
    monkeypatch.setattr(retriever, "retrieve", lambda *a: retrieve(*a)._replace(passage_tokens=None))
    with pytest.raises(UserError, match="stores no passage tokens"):
        one_pass(questions.task("both_arms", retriever=retriever))
    with pytest.raises(UserError, match="mode 'neither' is unknown"):
        Retrieve(retriever, mode="neither")


def test_stored_passages_are_split_at_the_separator():
    assert split_passage(np.array([5, 6, 1, 7, 8, 0])) == ([5, 6], [7, 8])
    assert split_passage(np.array([1, 7, 8, 0])) == ([], [7, 8])  # an empty title


def test_a_stream_that_retrieves_can_be_checkpointed(questions, retriever, tmp_path):
    task = questions.task("decided", retriever=retriever)
    ds = task.get_dataset({"inputs": 40, "targets": 8, "query": 40}, "train", shuffle=False)
    iterator = iter(ds)
    for _ in range(5):
        next(iterator)
    # A stateful numpy_function would make this raise.
    path = tf.train.Checkpoint(iterator=iterator).write(str(tmp_path / "iterator"))
    expected = [int(example["id"]) for example in iterator]
    restored = iter(ds)
    tf.train.Checkpoint(iterator=restored).read(path)
    assert [int(example["id"]) for example in restored] == expected == list(range(105, 137))
