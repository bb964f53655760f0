"""Tasks over a small almanac: batches against the generator's own records."""

import itertools

import numpy as np
import pytest

from expertrag_jax import evidence
from expertrag_jax.data.pipeline import Pipeline
from expertrag_jax.data.vocabularies import Vocabularies
from expertrag_jax.vocabulary import train_vocabulary
from tasks.almanac import AlmanacConfig, Lesson, World
from tasks.almanac.examples import closed_book_examples, splits
from tasks.almanac_tasks import register_almanac

CONFIG = AlmanacConfig(
    num_entities=150,
    num_asked_facts=600,
    num_training_questions=900,
    tail_ranks=150,
    gate_facts=60,
    validation_facts=40,
    test_questions=120,
    lessons={
        "sentence": Lesson(20, passages=1, facts=1, unrelated_share=0.1),
        "articles": Lesson(40, passages=4, facts=8, unrelated_share=0.1),
    },
    num_retriever_examples=40,
)
LENGTHS = {"inputs": 40, "targets": 12, "query": 40}


@pytest.fixture(scope="module")
def world():
    return World(CONFIG)


@pytest.fixture(scope="module")
def vocabulary(world, tmp_path_factory):
    questions = [e["question"] for e in itertools.islice(closed_book_examples(world), 300)]
    path = tmp_path_factory.mktemp("vocabulary") / "reader.model"
    return train_vocabulary([*questions, *world.passages(0).texts], 600, path)


@pytest.fixture(scope="module")
def tasks(vocabulary, tmp_path_factory):
    return register_almanac(CONFIG, tmp_path_factory.mktemp("tfds"), Vocabularies(vocabulary))


def rows_with_records(task, world, source_split, split="train", lengths=LENGTHS):
    """(batch, row, record) of every example, in order."""
    pipeline = Pipeline(
        task, lengths, 16, split=split, repeat=False, shuffle=False, process_index=0, process_count=1
    )
    batches = list(pipeline(0))
    records = list(splits(world)[source_split])
    assert pipeline.num_examples == len(records)
    for place, record in enumerate(records):
        assert batches[place // 16].example_ids[place % 16] == record["id"]
        yield batches[place // 16], place % 16, record


@pytest.mark.parametrize(
    "kind, source, split",
    [
        ("closed_book", "train_closed_book", "train"),
        ("questions", "gate", "gate"),
        ("questions", "test_edition_2", "test_edition_2"),
    ],
)
def test_questions_and_answers(tasks, world, vocabulary, kind, source, split):
    for batch, row, record in rows_with_records(tasks[kind], world, source, split):
        assert vocabulary.decode(batch.encoder_input_tokens[row]) == record["question"]
        assert vocabulary.decode(batch.decoder_target_tokens[row]) == record["answers"][0]
        assert batch.passage_tokens is None


@pytest.mark.parametrize("lesson", CONFIG.lessons)
def test_open_book(tasks, world, vocabulary, lesson):
    num_passages = CONFIG.lessons[lesson].passages
    lengths = LENGTHS | {"passages": 128}
    for batch, row, record in rows_with_records(
        tasks[f"open_book_{lesson}"], world, f"train_open_book_{lesson}", lengths=lengths
    ):
        question = vocabulary.encode(record["question"])
        assert batch.passage_tokens.shape[1:] == (num_passages, 128)
        for k, passage in enumerate(record["passages"]):
            title, text = vocabulary.encode(passage["title"]), vocabulary.encode(passage["text"])
            expected = evidence.assemble(question, title, text, 128)
            np.testing.assert_array_equal(batch.passage_tokens[row, k], expected)
            assert batch.passage_relevance[row, k] == passage["relevance"]
        assert vocabulary.decode(batch.decoder_target_tokens[row]) == record["answers"][0]


def test_retriever(tasks, world, vocabulary):
    lengths = {"query": 40, "passages": 64}
    for batch, row, record in rows_with_records(
        tasks["retriever"], world, "train_retriever", lengths=lengths
    ):
        assert vocabulary.decode(batch.query_tokens[row]) == record["question"]
        assert batch.passage_tokens.shape[1:] == (2, 64) and batch.encoder_input_tokens is None
        for k, passage in enumerate(record["passages"]):
            tokens = [*vocabulary.encode(passage["title"]), 1, *vocabulary.encode(passage["text"])][:64]
            np.testing.assert_array_equal(batch.passage_tokens[row, k], tokens + [0] * (64 - len(tokens)))
        assert batch.passage_relevance[row].tolist() == [1, 0]


def test_streaming_shuffles_within_a_buffer(tasks):
    def take(seed, start=0):
        pipeline = Pipeline(
            tasks["closed_book"],
            LENGTHS,
            16,
            seed=seed,
            materialise=False,
            process_index=0,
            process_count=1,
        )
        return [batch.example_ids for batch in itertools.islice(pipeline(start), 4)]

    first = take(0)
    np.testing.assert_array_equal(take(0, start=2)[:2], first[2:])
    assert (np.concatenate(first) != np.concatenate(take(1))).any()
    assert (np.diff(np.concatenate(first)) != 1).any()  # not the order of the files
