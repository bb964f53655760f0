"""Question tasks: the user's JSON lines, and TFDS's open-domain sets on mock data."""

import gzip
import json

import numpy as np
import pytest
import seqio
import tensorflow_datasets as tfds

from expertrag_jax.data.pipeline import Pipeline
from expertrag_jax.data.preprocessors import SEPARATOR
from expertrag_jax.data.vocabularies import Vocabularies
from expertrag_jax.errors import UserError
from expertrag_jax.vocabulary import train_vocabulary
from tasks import questions

LENGTHS = {"inputs": 40, "targets": 16, "query": 40}
LINES = [
    {"question": "who painted the ceiling", "answers": ["Michelangelo", "Buonarroti"], "id": "x7"},
    {
        "question": "which river runs through Vienna",
        "answers": ["the Danube"],
        "gold_passage_ids": ["p3", "p9"],
    },
    {
        "question": "when did the war end",
        "answers": ["1945"],
        "closed_book_correct": 0.0,
        "retrieval_correct": True,
    },
    {
        "question": "where is Oslo",
        "answers": ["Norway"],
        "closed_book_correct": True,
        "retrieval_correct": 1.0,
    },
]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    texts = [line["question"] + " " + line["answers"][0] for line in LINES] * 5
    path = tmp_path_factory.mktemp("vocabulary") / "reader.model"
    return train_vocabulary(texts, 300, path, byte_fallback=True)  # spells whatever the mock data holds


def one_pass(task, split="train", **options):
    pipeline = Pipeline(
        task,
        LENGTHS,
        4,
        split=split,
        repeat=False,
        shuffle=False,
        process_index=0,
        process_count=1,
        **options,
    )
    return list(pipeline(0))


def write(path, lines, opener=open):
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    return path


def test_json_lines(tmp_path, vocabulary):
    paths = {
        "train": write(tmp_path / "train.jsonl", LINES),
        "validation": write(tmp_path / "dev.jsonl.gz", LINES[2:], gzip.open),
    }
    task = questions.register_questions("mine", paths, Vocabularies(vocabulary))
    assert seqio.TaskRegistry.get("mine") is task and set(task.splits) == {"train", "validation"}
    (batch,) = one_pass("mine")
    assert batch.example_ids.tolist() == [0, 1, 2, 3]
    for row, line in enumerate(LINES):
        assert vocabulary.decode(batch.encoder_input_tokens[row]) == line["question"]
        assert vocabulary.decode(batch.decoder_target_tokens[row]) == line["answers"][0]
    (batch,) = one_pass("mine", "validation")
    assert batch.example_ids.tolist() == [0, 1, -1, -1]

    raw = list(task.source.get_dataset("train", shuffle=False).as_numpy_iterator())
    assert [r["answers"].decode().split(SEPARATOR) for r in raw] == [line["answers"] for line in LINES]
    assert raw[1]["gold"].decode().split(SEPARATOR) == ["p3", "p9"] and raw[0]["gold"] == b""
    np.testing.assert_array_equal([r["retrieval_needed"] for r in raw], [np.nan, np.nan, 1, 0])
    questions.register_questions("mine", paths, Vocabularies(vocabulary))  # registering again replaces


def test_bad_files_are_named(tmp_path, vocabulary):
    vocabularies = Vocabularies(vocabulary)
    bad = write(tmp_path / "bad.jsonl", [LINES[0], "{not json"])
    for path, message in (
        (bad, r"bad.jsonl:2"),
        (tmp_path / "none.jsonl", "none.jsonl"),
        (write(tmp_path / "bare.jsonl", [{"answers": ["a"]}]), r"bare.jsonl:1.*question"),
        (write(tmp_path / "unanswered.jsonl", [{"question": "a"}]), r"unanswered.jsonl:1.*answers"),
        (write(tmp_path / "empty.jsonl", []), "empty.jsonl"),
    ):
        for materialise in (True, False):
            with pytest.raises(UserError, match=message):
                one_pass(questions.register_questions("bad", path, vocabularies), materialise=materialise)


@pytest.fixture
def no_network(monkeypatch):
    from tensorflow_datasets.core.utils import gcs_utils

    monkeypatch.setattr(gcs_utils, "_is_gcs_disabled", True)


@pytest.mark.parametrize("dataset", ["natural_questions_open", "trivia_qa", "web_questions"])
def test_open_domain_sets(dataset, vocabulary, no_network):
    task = questions.register_open_domain(
        dataset, Vocabularies(vocabulary), name=f"mock_{dataset}", splits={"train": "train"}
    )
    with tfds.testing.mock_data(num_examples=6):
        raw = list(tfds.load(task.source.tfds_dataset.name, split="train").as_numpy_iterator())
        batches = [
            batch
            for batch in Pipeline(
                task,
                {"inputs": 400, "targets": 16, "query": 400},
                3,
                repeat=False,
                shuffle=False,
                process_index=0,
                process_count=1,
            )(0)
        ]
    assert len(raw) == 6 and [batch.size for batch in batches] == [3, 3]
    assert len({int(i) for batch in batches for i in batch.example_ids}) == 6
    for place, example in enumerate(raw):
        batch, row = batches[place // 3], place % 3
        asked = vocabulary.encode(example["question"].decode())
        tokens = batch.encoder_input_tokens[row]
        assert tokens[tokens != 0].tolist() == [*asked, 1]
        answers = {
            "natural_questions_open": lambda e: e["answer"][0],
            "trivia_qa": lambda e: e["answer"]["value"],
            "web_questions": lambda e: e["answers"][0],
        }[dataset](example)
        target = batch.decoder_target_tokens[row]
        assert target[target != 0].tolist() == [*vocabulary.encode(answers.decode())[:15], 1]


def test_default_splits_hold_the_published_dev_set_back(vocabulary):
    task = questions.register_open_domain("trivia_qa", Vocabularies(vocabulary))
    assert set(task.splits) == {"train", "validation", "test"}
    resolved = {split: task.source.tfds_dataset._map_split(split) for split in task.splits}
    assert resolved == {"train": "train[:90%]", "validation": "train[90%:]", "test": "validation"}
    with pytest.raises(UserError, match="web_questions"):
        questions.register_open_domain("squad", Vocabularies(vocabulary))
