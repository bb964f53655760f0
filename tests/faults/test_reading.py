"""What a user names to be read is a file, or a pipe that somebody writes; anything else is refused without a wait."""

from __future__ import annotations

import gzip
import os
import signal
import threading

import pytest

from expertrag_jax.errors import UserError
from expertrag_jax.files import reading
from expertrag_jax.retrieval.corpus import read_passages_tsv, read_questions_jsonl
from expertrag_jax.vocabulary import Vocabulary

READERS = [reading.contents, read_passages_tsv, read_questions_jsonl, Vocabulary.from_file]


@pytest.fixture
def places(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "WAIT", 0.2)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "link").symlink_to("/dev/zero")
    return tmp_path


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__qualname__)
@pytest.mark.parametrize(
    "name, message",
    [
        ("pipe", "is a pipe to which nobody writes"),
        ("folder", "is a folder"),
        ("missing", "no such file"),
        ("pipe/x", "cannot be read"),
        ("loop", "cannot be read"),
        ("link", "is a device"),
        ("/dev/zero", "is a device"),
        ("/proc/self/mem", "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(places, reader, name, message):
    with pytest.raises(UserError, match=message):
        reader(places / name)


def test_a_pipe_that_somebody_writes_is_read(places, monkeypatch):
    monkeypatch.setattr(reading, "WAIT", 60)
    rows = gzip.compress(b"1\tone\tA\n2\ttwo\tB\n")
    writer = threading.Timer(0.3, lambda: (places / "pipe").write_bytes(rows))
    writer.start()
    assert read_passages_tsv(places / "pipe").texts == ["one", "two"]
    writer.join()


def test_waiting_for_a_pipe_can_be_interrupted(places, monkeypatch):
    monkeypatch.setattr(reading, "WAIT", 600)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        reading.contents(places / "pipe")
    timer.join()


def test_a_pipe_without_a_name_is_read(places):
    end, start = os.pipe()
    os.write(start, b'{"question": "Who?"}\n')
    os.close(start)
    assert read_questions_jsonl(f"/dev/fd/{end}", require_answers=False)[0].question == "Who?"
    os.close(end)
