"""Paths are read in one place: homes, links, schemes, loops, and names that cannot be."""

from __future__ import annotations

import os

import pytest

from expertrag_jax.errors import UserError
from expertrag_jax.files.paths import local, target
from expertrag_jax.retrieval.corpus import Passages, open_text, read_questions_jsonl
from expertrag_jax.retrieval.documents import read_documents
from expertrag_jax.retrieval.index import make_index, open_index, write_index
from expertrag_jax.training.model_dir import open_model_dir


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for name in ("home", "real"):
        (tmp_path / name).mkdir()
    (tmp_path / "linked").symlink_to("real")
    (tmp_path / "loop").symlink_to("loop2")
    (tmp_path / "loop2").symlink_to("loop")
    return tmp_path


@pytest.mark.parametrize(
    "path, wanted",
    [
        ("~/a", "home/a"),
        ("~", "home"),
        ("a/../b", "b"),
        ("linked/x", "real/x"),
        ("linked", "linked"),
        ("file:{}/a", "file:{}/a"),
        ("file://{}/a", "a"),
        ("with blank", "with blank"),
        ("C:x", "C:x"),
    ],
)
def test_a_path_is_absolute(folder, path, wanted):
    path, wanted = path.replace("{}", str(folder)), wanted.replace("{}", str(folder))
    assert local(path) == folder / wanted and target("linked") == folder / "real"


@pytest.mark.parametrize("read", [local, target, open_model_dir], ids=lambda function: function.__name__)
@pytest.mark.parametrize(
    "path, message",
    [
        ("gs://bucket/run", "gs:// cannot be read or written"),
        ("s3://bucket/run", "s3:// cannot be read or written"),
        ("HTTPS://host/x", "HTTPS:// cannot be"),
        ("loop", "Too many levels of symbolic links"),
        ("loop/x", "Too many levels of symbolic links"),
        ("a" * 300, "File name too long"),
        ("", "is no path"),
        ("   ", "is no path"),
        ("a\0b", "holds a zero byte"),
        ("a\udcffb", "half a character"),
        ("~nobody-of-this-name/x", "not known here"),
    ],
)
def test_what_cannot_be_a_path_is_one_sentence(folder, read, path, message):
    before = sorted(folder.iterdir())
    with pytest.raises(UserError, match=message) as refused:
        read(path)
    str(refused.value).encode()  # can be printed
    assert sorted(folder.iterdir()) == before


def test_an_index_that_is_a_link_is_replaced_behind_it(folder):
    passages = Passages(["0", "1"], ["", ""], ["one word", "another word"])
    index = make_index("bm25").build(passages)
    write_index("linked/index", index, passages)
    os.symlink("real/index", folder / "current")
    write_index("current", index, passages, overwrite=True)
    assert (folder / "current").is_symlink() and len(open_index("current")) == 2
    assert sorted(os.listdir(folder / "real")) == ["index"]


@pytest.mark.parametrize("name", ["there.jsonl", "none.jsonl", "real", "loop"])
def test_files_that_cannot_be_read_are_named(folder, name):
    (folder / "there.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=name), open_text(name) as file:
        file.read()
    with pytest.raises(UserError, match=name):
        read_questions_jsonl(name)


def test_a_document_whose_name_is_no_text_is_refused(folder):
    (folder / "real" / os.fsdecode(b"caf\xe9.txt")).write_text("Text.")
    with pytest.raises(UserError, match="is no UTF-8 text: rename the file") as refused:
        read_documents("real")
    str(refused.value).encode()
