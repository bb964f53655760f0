"""The questions of a task as records, for evaluation."""

import json

import pytest

from expertrag_jax.data.question_tasks import read_task_questions
from expertrag_jax.data.vocabularies import Vocabularies
from expertrag_jax.errors import UserError
from tasks.questions import register_questions


@pytest.fixture
def task(tmp_path, vocabulary):
    records = [
        {"question": 'Who, "then"?', "answers": ["Ann", "A. Ö."], "gold_passage_ids": ["p3", "p1"]},
        {"question": "What colour?", "answers": ["red"]},
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return register_questions("read_back", {"test": path}, Vocabularies(vocabulary.path))


def test_records_keep_all_answers_and_gold_passages_in_order(task):
    for named in (task, "read_back"):
        first, second = read_task_questions(named, "test")
        assert (first.question, first.answers) == ('Who, "then"?', ("Ann", "A. Ö."))
        assert first.gold_passage_ids == ("p3", "p1")
        assert (second.id, second.answers, second.gold_passage_ids) == ("1", ("red",), ())


def test_an_unknown_task_or_split_is_refused(task):
    with pytest.raises(UserError, match="has no split 'dev': choose one of test"):
        read_task_questions(task, "dev")
    with pytest.raises(UserError, match="MIXTURE_OR_TASK_NAME"):
        read_task_questions("nobody_registered_this", "test")
