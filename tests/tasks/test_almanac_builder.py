"""The TFDS builder end to end on a tiny world, offline."""

from __future__ import annotations

import socket

import pytest

from expertrag_jax.retrieval.corpus import read_questions_jsonl
from tasks.almanac import AlmanacConfig, AlmanacError, Lesson, World
from tasks.almanac.examples import splits

tfds = pytest.importorskip("tensorflow_datasets")

TINY = AlmanacConfig(
    num_entities=40,
    num_asked_facts=200,
    num_training_questions=400,
    tail_ranks=60,
    gate_facts=20,
    validation_facts=10,
    test_questions=40,
    lessons={
        "sentence": Lesson(30, passages=1, facts=1, unrelated_share=0.1),
        "articles": Lesson(20, passages=3, facts=8, unrelated_share=0.1),
    },
    num_retriever_examples=20,
)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    from tasks.almanac import builder

    def refuse(*args, **kwargs):
        raise AssertionError("the builder used the network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        directory = tmp_path_factory.mktemp("tfds")
        builder.prepare(TINY, directory, progress=False)
    return directory


def to_plain(example) -> dict:
    """TFDS's numpy example in the form that ``examples.py`` yields."""
    plain = {
        key: value.item() for key, value in example.items() if key not in TEXTS | {"answers", "passages"}
    }
    plain |= {key: example[key].decode() for key in TEXTS}
    passages = example["passages"]
    columns = zip(passages["title"], passages["text"], passages["relevance"], strict=True)
    plain["passages"] = [
        {"title": a.decode(), "text": b.decode(), "relevance": float(c)} for a, b, c in columns
    ]
    plain["answers"] = [answer.decode() for answer in example["answers"]]
    return plain


TEXTS = {"question", "stratum"}


def test_files_hold_the_examples_in_order(data_dir):
    from tasks.almanac import builder

    info = builder.prepare(TINY, data_dir, progress=False).info
    assert {"train_open_book_sentence", "train_open_book_articles"} < set(info.splits)
    generated = splits(World(TINY))
    assert set(info.splits) == set(generated)
    for split, examples in generated.items():
        dataset = tfds.load(builder.tfds_name(TINY), data_dir=str(data_dir), split=split)
        read = [to_plain(example) for example in dataset.as_numpy_iterator()]
        expected = list(examples)
        assert len(read) == len(expected) > 0
        for got, want in zip(read, expected):
            assert got.pop("weight") == pytest.approx(want.pop("weight"))
            assert got == want


def test_a_prepared_world_is_not_written_again(data_dir, monkeypatch):
    from tasks.almanac import builder

    monkeypatch.setattr(builder.Almanac, "_generate_examples", None)
    assert builder.prepare(TINY, data_dir, progress=False).info.splits["gate"].num_examples == 40


def test_an_impossible_world_leaves_nothing_behind(tmp_path):
    from tasks.almanac import builder

    with pytest.raises(AlmanacError):
        builder.prepare(AlmanacConfig(num_entities=40), tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_questions_of_another_world_are_not_written(tmp_path, capsys):
    from tasks.almanac.question_files import main

    for told, wanted in (("holds no demo", None), ("another world", "0" * 12)):
        if wanted:
            (tmp_path / "world.json").write_text(f'{{"world": "{wanted}"}}')
        with pytest.raises(SystemExit) as stop:
            main(["--demo_dir", str(tmp_path)])
        assert stop.value.code == 2 and told in capsys.readouterr().err
    assert not (tmp_path / "questions").exists() and not (tmp_path / "world").exists()


def test_questions_as_files(data_dir, tmp_path):
    from tasks.almanac.question_files import write_question_files

    world = World(TINY)
    counts = write_question_files(TINY, data_dir, tmp_path)
    questions = {name: read_questions_jsonl(tmp_path / f"{name}.jsonl") for name in counts}
    assert {name: len(found) for name, found in questions.items()} == counts
    assert counts["test_edition_1"] == counts["test_edition_2"] == 40 and counts["changed_edition_1"] > 0
    for edition in (1, 2):
        texts = dict(zip((f"e{row}" for row in range(40)), world.passages(edition).texts))
        for question in (*questions[f"test_edition_{edition}"], *questions[f"changed_edition_{edition}"]):
            (gold,) = question.gold_passage_ids
            assert question.answers[0] in texts[gold]
    for one, two in zip(questions["changed_edition_1"], questions["changed_edition_2"], strict=True):
        assert one.id == two.id and one.question == two.question and not set(one.answers) & set(two.answers)
