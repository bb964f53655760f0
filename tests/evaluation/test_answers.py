from __future__ import annotations

import csv
import gzip
import json
import os
import pathlib
import random

import pytest

from expertrag_jax.evaluation import answers

needs_data = pytest.mark.skipif(not os.environ.get("EXPERTRAG_DATA"), reason="EXPERTRAG_DATA is not set")
COLUMNS = {"squad": answers.squad1, "squad2": answers.squad2, "hotpot": answers.hotpot, "kilt": answers.kilt}


def _data(path: str) -> pathlib.Path:
    return pathlib.Path(os.environ["EXPERTRAG_DATA"]) / path


@needs_data
def test_every_case_equals_the_official_scorers():
    rows = [json.loads(line) for line in _data("scoring/answer_cases.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == 1251
    for row in rows:
        for prefix, scorer in COLUMNS.items():
            expected = {
                name.removeprefix(f"{prefix}_"): value
                for name, value in row.items()
                if name.startswith(f"{prefix}_")
            }
            got = scorer(row["prediction"], row["answers"])
            assert got == pytest.approx(expected, abs=1e-12), (
                prefix,
                row["id"],
                row["prediction"],
                row["answers"],
            )


@needs_data
def test_unanswerable_cases_equal_squad2():
    for line in _data("scoring/answer_cases_unanswerable.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        got = answers.squad2(row["prediction"], row["answers"])
        assert got == {"em": row["squad2_em"], "f1": row["squad2_f1"]}, row


@needs_data
def test_has_answer_equals_the_labels_of_the_retrieved_passages():
    with gzip.open(_data("qa/popqa_dev.jsonl.gz"), "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    rows = [row for row in rows if row.get("retrieved_passage_ids")]
    wanted = {row["retrieved_passage_ids"][0] for row in rows}
    with gzip.open(_data("wiki/passages.tsv.gz"), "rt", encoding="utf-8", newline="") as lines:
        texts = {row[0]: row[1] for row in csv.reader(lines, delimiter="\t") if row[0] in wanted}
    labels = [bool(row["retrieved_has_answer"]) for row in rows]
    assert len(rows) > 1000 and 0.2 < sum(labels) / len(labels) < 0.8
    assert [
        answers.has_answer(texts[row["retrieved_passage_ids"][0]], row["answers"]) for row in rows
    ] == labels


@needs_data
@pytest.mark.parametrize("name", ["hotpotqa_train", "2wikimultihopqa_train"])
def test_has_answer_equals_the_in_accuracy_labels(name):
    with gzip.open(_data(f"qa/{name}.jsonl.gz"), "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    for arm in ("closed_book", "retrieval"):
        got = [float(answers.has_answer(row[f"{arm}_answer"], row["answers"])) for row in rows]
        assert got == [row[f"{arm}_correct"] for row in rows]


def test_normalisation():
    assert answers.normalise("  The  U.S. a-An\tapple ") == "us aan apple"


@pytest.mark.parametrize(
    ("prediction", "accepted", "squad1_f1", "squad2_f1", "hotpot_f1"),
    [("the", ["a"], 0.0, 1.0, 0.0), ("no way", ["no"], 2 / 3, 2 / 3, 0.0), ("x y", ["y z"], 0.5, 0.5, 0.5)],
)
def test_the_rules_differ_at_the_edges(prediction, accepted, squad1_f1, squad2_f1, hotpot_f1):
    got = [scorer(prediction, accepted)["f1"] for scorer in (answers.squad1, answers.squad2, answers.hotpot)]
    assert got == pytest.approx([squad1_f1, squad2_f1, hotpot_f1])


def test_no_answers_is_an_error_but_for_squad2():
    assert answers.squad2("", []) == {"em": 1.0, "f1": 1.0}
    for scorer in (answers.squad1, answers.hotpot, answers.kilt):
        with pytest.raises(ValueError, match="at least one answer"):
            scorer("x", [])
    with pytest.raises(ValueError, match="at least one answer"):
        answers.kilt("x", [" "])


def test_kilt_gives_an_empty_prediction_nothing():
    assert answers.kilt(" ", ["the", "x"]) == {"accuracy": 0, "em": 0, "f1": 0, "rougel": 0}


def _longest(x, y):
    """Length of the longest common subsequence, by trying every subsequence of x."""
    best = 0
    for chosen in range(1 << len(x)):
        words = [word for bit, word in enumerate(x) if chosen >> bit & 1]
        rest = iter(y)
        if all(word in rest for word in words):
            best = max(best, len(words))
    return best


def test_rouge_of_one_sentence_is_the_longest_common_subsequence():
    rng = random.Random(0)
    for _ in range(100):
        x, y = (
            rng.sample("abcdefgh", rng.randint(1, 6)) for _ in range(2)
        )  # distinct words: a set loses none
        precision, recall = _longest(x, y) / len(y), _longest(x, y) / len(x)
        expected = 2 * precision * recall / (precision + recall + 1e-8)
        assert answers.rouge_l(" ".join(y), " ".join(x)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("Born in São-Paulo, 1999.", "sao paulo", False),  # NFD keeps the mark inside the token
        ("Born in São-Paulo, 1999.", "SÃO-PAULO", True),
        ("the theatre", "the", True),
        ("theatre", "the", False),
        ("in the U.S. today", "U.S.", True),
        ("in the US today", "U.S.", False),
        ("anything", " \t", False),
        ("", "x", False),
        ("a b a c", "a c", True),
    ],
)
def test_has_answer(text, answer, expected):
    assert answers.has_answer(text, ["absent phrase", answer]) is expected
