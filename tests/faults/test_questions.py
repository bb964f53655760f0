"""What can be known from files of questions is said before the first answer, with file and line."""

from __future__ import annotations

import json

import pytest

from expertrag_jax import evaluate
from expertrag_jax.main import main

pytestmark = pytest.mark.usefixtures("fast_compile")
FAST = ("--gin.evaluate.evaluate.buckets=(4,)", "--gin.evaluate.evaluate.rounds=1")
RIGHT = {"question": "Where does Bela Korv live?", "answers": ["Arlen"], "gold_passage_ids": ["e0"]}


def written(folder, *lines) -> str:
    """A file with these lines: records, or text as it is."""
    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    (folder / "q.jsonl").write_text(text)
    return f"--questions={folder / 'q.jsonl'}"


def commands(tiny, folder, asked) -> list[list[str]]:
    """The commands that read questions and need answers or gold passages."""
    model = f"--model_dir={tiny.model_dir}"
    return [
        ["evaluate", model, asked, f"--output_dir={folder / 'report'}", *FAST],
        ["calibrate", model, asked, "--overwrite"],
        ["mine", asked, f"--index_dir={tiny.index_dir}", f"--retriever={tiny.model_dir}",
         f"--output={folder / 'mined.jsonl'}"],
        ["infer", model, asked, f"--output={folder / 'scores.jsonl'}", "--mode=score"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"question": "a", "answers": ["b"], "x": ' + "9" * 5000 + "}\n", "a number that is too long"),
        ('{"question": "a", "answers": ' + "[" * 200_000 + "]" * 200_000 + "}\n", "nested too deeply"),
        ('{"question": "a \\ud800", "answers": ["b"]}\n', "half a surrogate pair"),
        ('{"question": "a", "answers": ["\\udc00"]}\n', "half a surrogate pair"),
        ('{"question": "a", "answers": ["b"], "x": {"\\ud83d": 1}}\n', "half a surrogate pair"),
        ('{"question": "a", "answers": ["b"], "x": 1\n', "not JSON"),
        ('{"question": " ", "answers": ["b"]}\n', "'question' is missing or empty"),
        ('{"question": "a", "answers": "b"}\n', "'answers' must be a list of strings"),
        ('{"question": "a", "answers": []}\n', "'answers' is missing or empty"),
    ],
    ids=lambda value: value[:40],
)
def test_every_command_names_the_line(tiny, tmp_path, capsys, line, message):
    for arguments in commands(tiny, tmp_path, written(tmp_path, RIGHT, line)):
        assert main(arguments) == 2, arguments
        (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert f"{tmp_path / 'q.jsonl'}:2: " in error and message in error, arguments
    assert [path.name for path in tmp_path.iterdir()] == ["q.jsonl"]


def test_gold_passages_of_another_corpus_are_refused_before_the_first_answer(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "answer_both", None)  # nothing is answered
    asked = written(tmp_path, RIGHT, RIGHT | {"gold_passage_ids": ["nobody"]})
    for arguments in commands(tiny, tmp_path, asked)[::2]:
        assert main(arguments) == 2
        assert "question '1' names the gold passage 'nobody', which is not in the corpus" in capsys.readouterr().err


def test_more_passages_than_the_corpus_has_are_read_as_far_as_it_goes(tiny, tmp_path):
    arguments = commands(tiny, tmp_path, written(tmp_path, RIGHT))[0]
    assert main([*arguments, "--num_passages=20"]) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["retrieval"]["recall_at_k"] == 1.0  # of the 15 there are


def test_squad2_has_questions_without_answers(tiny, tmp_path):
    asked = written(tmp_path, RIGHT, {"question": "Where does Nobody live?", "answers": []})
    assert main([*commands(tiny, tmp_path, asked)[0], "--rule=squad2"]) == 0
    rows = (tmp_path / "report" / "predictions.jsonl").read_text().splitlines()
    assert len(rows) == 2


def test_half_a_character_on_the_command_line_is_one_sentence(capsys):
    for arguments in (["answer", "--export_dir=x", "Where is \udcc3?"], ["infer", "--questions=\udcff.jsonl"]):
        assert main(arguments) == 2
        assert "is no UTF-8 text" in capsys.readouterr().err
