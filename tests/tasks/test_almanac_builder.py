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


SMALL = {
    "num_entities": 100, "num_asked_facts": 600, "num_training_questions": 600, "tail_ranks": 150,
    "num_retriever_examples": 20, "lesson_share": 0.01, "gate_facts": 20, "validation_facts": 20,
    "test_questions": 100,
}  # fmt: skip


@pytest.fixture
def demo_folder(tmp_path, monkeypatch):
    """The folder of `expertrag demo` on the world SMALL, stopped when it has noted in it what it runs."""
    from expertrag_jax import demo
    from expertrag_jax.main import main

    class Stopped(Exception):
        pass

    def stop_after(check_folder):
        def check(*arguments):
            check_folder(*arguments)
            raise Stopped

        return check

    monkeypatch.setattr(demo, "check_folder", stop_after(demo.check_folder))
    bindings = [f"--gin_bindings=AlmanacConfig.{name} = {value}" for name, value in SMALL.items()]
    with pytest.raises(Stopped):
        main(["demo", "--gin_file=runs/almanac.gin", f"--gin.MODEL_DIR={tmp_path / 'demo'}", *bindings])
    return tmp_path / "demo"


def test_the_questions_are_those_of_the_demos_own_world(demo_folder, capsys):
    from tasks.almanac import builder
    from tasks.almanac.question_files import main

    config = AlmanacConfig(**SMALL)
    builder.prepare(config, demo_folder / "world", progress=False)
    main(["--demo_dir", str(demo_folder)])
    assert "test_edition_1.jsonl: 100 questions" in capsys.readouterr().out
    titles = {f"e{row}": title for row, title in enumerate(World(config).passages(1).titles)}
    questions = read_questions_jsonl(demo_folder / "questions" / "gate.jsonl")
    assert len(questions) == 40
    assert all(titles[question.gold_passage_ids[0]] in question.question for question in questions)


def test_a_folder_without_a_demo_or_its_world_is_refused(demo_folder, tmp_path, capsys):
    from tasks.almanac.question_files import main

    def refused(folder) -> str:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as stop:
            main(["--demo_dir", str(folder)])
        assert stop.value.code == 2 and sorted(tmp_path.rglob("*")) == before
        return capsys.readouterr().err

    assert "holds no demo" in refused(tmp_path)
    assert "lacks the world" in refused(demo_folder)
    (demo_folder / "world.json").write_text('{"world": "0123456789ab"}')
    assert "not written by this release" in refused(demo_folder)


def test_questions_as_files(data_dir, tmp_path):
    from tasks.almanac import builder
    from tasks.almanac.question_files import write_question_files

    world = World(TINY)
    prepared = builder.prepare(TINY, data_dir, progress=False).data_path
    counts = write_question_files(prepared, tmp_path)
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
