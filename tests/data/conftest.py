"""A vocabulary, a small corpus with a retriever over it, and a task of questions."""

import dataclasses
import types

import numpy as np
import pytest
import seqio
import tensorflow as tf

from expertrag_jax.data.preprocessors import record
from expertrag_jax.data.question_tasks import question_task
from expertrag_jax.data.vocabularies import Vocabularies
from expertrag_jax.retrieval.retriever import Retrieved
from expertrag_jax.vocabulary import train_vocabulary

WORDS = "red green blue amber violet stone river cloud lamp garden north south winter summer copper".split()


def sentence(rng, low, high):
    return " ".join(rng.choice(WORDS, rng.integers(low, high)))


@dataclasses.dataclass
class FakeRetriever:
    """Passages by a rule that a test can repeat: question i's k-th passage has row (its length + k) mod N."""

    tokens: np.ndarray  # [N, S]
    ids: list
    calls: list = dataclasses.field(default_factory=list)

    @property
    def loaded(self):
        return types.SimpleNamespace(passages=types.SimpleNamespace(ids=self.ids), directory="fake")

    def rows(self, question, k):
        return [(len(question) + i) % len(self.ids) for i in range(k)]

    def retrieve(self, texts, query_tokens, k):
        assert len(texts) == len(query_tokens)
        self.calls.append(list(texts))
        rows = np.array([self.rows(text, k) for text in texts], np.int32).reshape(len(texts), k)
        scores = np.array([[len(text) / 10 - i for i in range(k)] for text in texts], np.float32)
        return Retrieved(rows, scores.reshape(len(texts), k), self.tokens[rows])


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory):
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("vocabulary") / "reader.model"
    return train_vocabulary([sentence(rng, 3, 9) for _ in range(300)], 90, path)


@pytest.fixture(scope="session")
def vocabularies(vocabulary):
    return Vocabularies(vocabulary)


@pytest.fixture
def retriever(vocabulary):
    rng = np.random.default_rng(1)
    tokens = np.zeros((13, 24), np.int32)
    for row in range(13):
        ids = [*vocabulary.encode(WORDS[row]), 1, *vocabulary.encode(sentence(rng, 3, 12))][:24]
        tokens[row, : len(ids)] = ids
    return FakeRetriever(tokens, [f"p{row}" for row in range(13)])


@dataclasses.dataclass
class Questions:
    """Records, and tasks over them."""

    records: list
    vocabularies: Vocabularies

    def task(self, mode="closed_book", name="questions", records=None, **evidence):
        records = self.records if records is None else records

        def source(split, shuffle_files, seed=None):
            columns = {k: [r[k] for r in records] for k in ("question", "needed")}
            columns["id"] = np.array([r["id"] for r in records], np.int64)
            for k in ("answers", "gold"):
                columns[k] = tf.ragged.constant([r[k] for r in records], tf.string, ragged_rank=1)
            return tf.data.Dataset.from_tensor_slices(columns)

        def to_record(r):
            return record(r["question"], r["answers"], r["id"], r["gold"], r["needed"])

        data = seqio.FunctionDataSource(source, ["train"])
        return question_task(name, data, to_record, self.vocabularies, mode, **evidence)


@pytest.fixture
def questions(vocabularies):
    rng = np.random.default_rng(2)
    records = [
        {
            "id": 100 + i,
            "question": "what is the " + sentence(rng, 1, 6),
            "answers": [sentence(rng, 1, 3), "other"],
            "gold": [f"p{rng.integers(13)}"] if i % 3 else [],
            "needed": np.float32([1, 0, np.nan][i % 3]),
        }
        for i in range(37)
    ]
    return Questions(records, vocabularies)
