"""Documents to passages: sentence bounds, lengths, headings, refusals."""

from __future__ import annotations

import gzip
import json
import time

import numpy as np
import pytest

from expertrag_jax.errors import UserError
from expertrag_jax.retrieval.documents import markdown_sections, read_documents
from expertrag_jax.retrieval.splitting import sentences, split_text


def test_sentences_end_where_readers_end_them():
    text = 'Dr. A. Smith met J. R. Jones.  He said "Go!" Then 3.5 km later\nthey stopped. '
    text += "Why? No. 7 knew, e.g. Bob."
    assert sentences(text) == [
        "Dr. A. Smith met J. R. Jones.",
        'He said "Go!"',
        "Then 3.5 km later they stopped.",
        "Why?",
        "No. 7 knew, e.g. Bob.",
    ]
    assert " ".join(sentences(text)) == " ".join(text.split())
    assert sentences("  ") == []


def test_passages_hold_whole_sentences_as_many_as_fit():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 40, size=60)
    parts = [" ".join(["Word"] + ["word"] * (length - 1)) + "." for length in lengths]
    passages = split_text(" ".join(parts), max_words=50)
    assert " ".join(passages) == " ".join(parts)
    sizes = [len(passage.split()) for passage in passages]
    assert max(sizes) <= 50 and all(passage.endswith(".") for passage in passages)
    first_sentences = [len(sentences(passage)[0].split()) for passage in passages]
    # greedy: the next passage's first sentence would not have fitted
    assert all(size + following > 50 for size, following in zip(sizes, first_sentences[1:]))


def test_a_sentence_longer_than_a_passage_is_cut():
    text = " ".join(["Short one.", "Word"] + ["word"] * 249) + ". Last one."
    passages = split_text(text, max_words=100)
    assert [len(passage.split()) for passage in passages] == [2, 100, 100, 52]
    assert " ".join(passages) == text
    with pytest.raises(UserError, match="max_words is 0"):
        split_text(text, 0)


def test_markdown_headings_become_titles():
    text = (
        "Before.\n# Guide #\nIntro.\n```sh\n# not a heading\n```\n## Install\n\nRun it.\n### Empty\n#hash\n"
    )
    assert markdown_sections(text, "readme") == [
        ("readme", "Before."),
        ("Guide", "Intro.\n```sh\n# not a heading\n```"),
        ("Install", "\nRun it."),
        ("Empty", "#hash"),
    ]


def test_reads_a_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("One sentence. " * 120)
    (tmp_path / "sub" / "b.md").write_text("# Title\nText here.\n")
    records = [{"id": "x", "title": "X", "text": "About x."}, {"contents": "No title."}, {"text": " "}]
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    passages = read_documents(tmp_path)
    assert passages.ids == ["a.txt#0", "a.txt#1", "a.txt#2", "x#0", "c.jsonl:2#0", "sub/b.md:0#0"]
    assert passages.titles == ["a", "a", "a", "X", "", "Title"]
    assert max(len(text.split()) for text in passages.texts) == 100
    assert read_documents(tmp_path / "sub" / "b.md").texts == ["Text here."]


@pytest.mark.parametrize(
    "name, title",
    [
        ("Dr. Smith.txt", "Dr. Smith"),
        ("v1.2 notes.md", "v1.2 notes"),
        (".hidden.txt", ".hidden"),
        ("a.MD.GZ", "a"),
        ("a.TXT.gz", "a"),
        ("b.JSONL.GZ", "A title"),
    ],
)
def test_a_document_is_of_its_kind_and_named_whole(tmp_path, name, title):
    content = b'{"text": "Text.", "title": "A title"}' if "JSON" in name else b"Text."
    (tmp_path / name).write_bytes(gzip.compress(content) if name.lower().endswith("gz") else content)
    passages = read_documents(tmp_path)
    assert (passages.titles, passages.texts) == ([title], ["Text."])


@pytest.mark.parametrize("piece", ["A. ", "No. 1 ", "word ", "U.S. "])
def test_a_long_text_is_split_in_linear_time(piece):
    began = time.process_time()
    passages = split_text(piece * 30_000)
    assert "".join("".join(passages).split()) == (piece * 30_000).replace(" ", "")
    assert time.process_time() - began < 20  # .5 s; it was six minutes


def test_bad_documents_are_refused_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        read_documents(tmp_path / "none")
    with pytest.raises(UserError, match="no document in the folder"):
        read_documents(tmp_path)
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(UserError, match="unknown kind of document"):
        read_documents(tmp_path / "a.pdf")
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(UserError, match="the corpus is empty"):
        read_documents(tmp_path)
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{"text": 1}\n')
    with pytest.raises(UserError, match=r"b\.jsonl:2: a document needs 'text'"):
        read_documents(tmp_path)
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{oops\n')
    with pytest.raises(UserError, match=r"b\.jsonl:2: not JSON"):
        read_documents(tmp_path)
    (tmp_path / "b.jsonl").write_text('{"id": 1, "text": "a"}\n{"id": 1, "text": "b"}\n')
    with pytest.raises(UserError, match="document id '1' occurs twice"):
        read_documents(tmp_path)
