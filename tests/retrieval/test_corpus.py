"""Readers of passages and questions: what they read, and how they refuse."""

from __future__ import annotations

import gzip
import json
import os

import pytest

from expertrag_jax.errors import UserError
from expertrag_jax.retrieval.corpus import (
    Passages,
    read_passages_tsv,
    read_questions_jsonl,
    texts_of,
    write_passages_tsv,
)

HEADER = "id\ttext\ttitle\n"


def write(tmp_path, content, name="passages.tsv"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_reads_dpr_format(tmp_path):
    content = HEADER + 'p0\tA text.\tA title\np1\t"Kaep (he says ""Kap"")."\t\n'
    plain = read_passages_tsv(write(tmp_path, content))
    assert plain.ids == ["p0", "p1"] and plain.titles == ["A title", ""]
    assert plain.texts == ["A text.", 'Kaep (he says "Kap").']
    packed = read_passages_tsv(write(tmp_path, gzip.compress(content.encode()), "p.tsv.gz"))
    assert packed.texts == plain.texts and packed.digest == plain.digest
    headless = read_passages_tsv(write(tmp_path, content[len(HEADER) :]))
    assert headless.digest == plain.digest
    swapped = read_passages_tsv(write(tmp_path, "id\ttitle\ttext\np0\tT\tX\n"))
    assert (swapped.titles, swapped.texts) == (["T"], ["X"])


def test_written_passages_are_read_back(tmp_path):
    texts = ['say "hi"', "tab\there", "two\nlines", "carriage\rreturn", "", "ünïcode …", 'x "', "a\r\nb"]
    passages = Passages([str(number) for number in range(len(texts))], [text[::-1] for text in texts], texts)
    write_passages_tsv(passages, tmp_path / "p.tsv.gz")
    again = read_passages_tsv(tmp_path / "p.tsv.gz")
    assert (again.ids, again.titles, again.texts) == (passages.ids, passages.titles, passages.texts)
    write_passages_tsv(passages, tmp_path / "q.tsv.gz")
    assert (tmp_path / "p.tsv.gz").read_bytes() == (tmp_path / "q.tsv.gz").read_bytes()


def test_digest_sees_every_field_and_the_order():
    base = Passages(["a", "b"], ["t", "u"], ["x", "y"])
    others = [
        Passages(["b", "a"], ["u", "t"], ["y", "x"]),
        Passages(["a", "b"], ["tx", "u"], ["", "y"]),
        Passages(["a", "c"], ["t", "u"], ["x", "y"]),
    ]
    assert base.digest == Passages(["a", "b"], ["t", "u"], ["x", "y"]).digest
    assert len({base.digest, *(other.digest for other in others)}) == 4
    assert base.row_of() == {"a": 0, "b": 1}


@pytest.mark.parametrize(
    "content, message",
    [
        (HEADER + "p0\ttext\ttitle\np1\ttext only\n", r"passages\.tsv:3: 2 columns where 3 are expected"),
        (HEADER + "p0\ta\tb\tc\n", r"passages\.tsv:2: 4 columns"),
        (HEADER + 'p0\t"open\tt\np1\ta\tb\n', r"passages\.tsv:2: .*double quote opened on line 2"),
        (HEADER + "p0\ta\tb\n\np0\tc\td\n", r"passages\.tsv:4: passage id 'p0' already stands on line 2"),
        (HEADER + "\ta\tb\n", r"passages\.tsv:2: the passage has an empty id"),
        (HEADER, "the corpus is empty"),
        ("", "the corpus is empty"),
        (gzip.compress(b"p0\ta\tb\n" * 50, mtime=0)[:-12], "not a complete gzip file"),
        (b"p0\t\xff\xfe\tb\n", "not UTF-8"),
    ],
)
def test_bad_passages_are_refused_in_one_sentence(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        read_passages_tsv(write(tmp_path, content))


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_passages_tsv(tmp_path / "none.tsv")
    with pytest.raises(UserError, match="is a folder"):
        read_questions_jsonl(tmp_path)


def test_reads_questions(tmp_path):
    lines = [
        {"id": 7, "question": "Who?", "answers": ["A", "B"], "gold_passage_ids": ["p0"], "relation": "P1"},
        {"question": "What?", "answers": ["C"]},
    ]
    path = write(tmp_path, "\n\n".join(json.dumps(line) for line in lines), "q.jsonl")
    first, second = read_questions_jsonl(path)
    assert (first.id, first.answers, first.gold_passage_ids) == ("7", ("A", "B"), ("p0",))
    assert first.extra == {"relation": "P1"} and second.id == "1" and second.gold_passage_ids == ()
    assert texts_of([first, second]) == ["Who?", "What?"]
    bare = write(tmp_path, '{"question": "Who?"}', "bare.jsonl")
    assert read_questions_jsonl(bare, require_answers=False)[0].answers == ()


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"question": "a", "answers": ["b"]}\n{"question": ', r"q\.jsonl:2: not JSON"),
        ("[1]\n", r"q\.jsonl:1: a JSON object is expected, not list"),
        ('\n{"answers": ["b"]}\n', r"q\.jsonl:2: the field 'question'"),
        ('{"question": "a"}\n', r"q\.jsonl:1: the field 'answers'"),
        ('{"question": "a", "answers": "b"}\n', r"q\.jsonl:1: 'answers' must be a list of strings"),
        ('{"id": 1, "question": "a", "answers": ["b"]}\n' * 2, r"q\.jsonl:2: question id '1' already"),
        ("\n", "no question in the file"),
    ],
)
def test_bad_questions_are_refused_in_one_sentence(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        read_questions_jsonl(write(tmp_path, content, "q.jsonl"))


@pytest.mark.skipif(not os.environ.get("EXPERTRAG_DATA"), reason="EXPERTRAG_DATA is not set")
def test_reads_wikipedia_passages():
    path = os.path.join(os.environ["EXPERTRAG_DATA"], "wiki", "passages.tsv.gz")
    passages = read_passages_tsv(path)
    assert len(passages) == 65_903 and passages.ids[1] == "p1"
    assert passages.texts[1].startswith(
        'Kaep is a nickname for athlete Colin Kaepernick (although he prefers "Kap")'
    )
    assert sum(not title for title in passages.titles) == 1990
