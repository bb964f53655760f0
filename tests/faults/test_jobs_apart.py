"""Jobs do not mix: results are resumed by content, one writer at a time, and outputs replace nothing that they read."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from expertrag_jax.errors import UserError
from expertrag_jax.files.lock import is_dead, locked, only_writer
from expertrag_jax.files.writing import check_output, remove_dead, whole
from expertrag_jax.infer import finished_questions, job_key
from expertrag_jax.interop.export_directory import FORMAT as EXPORT
from expertrag_jax.main import main
from expertrag_jax.retrieval.corpus import Question
from expertrag_jax.retrieval.manifest import FORMAT as INDEX
from expertrag_jax.service import service_from_model
from expertrag_jax.trained_model import open_model

HOLD = """
import sys, time
from pathlib import Path
from expertrag_jax.files.lock import only_writer
with only_writer(Path(sys.argv[1]), "x", inside=sys.argv[2] == "inside"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Starts processes that hold a lock, and ends them."""
    started = []

    def start(path, inside):
        command = [sys.executable, "-c", HOLD, str(path), "inside" if inside else "beside"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_the_second_writer_is_refused_until_the_first_is_gone(tmp_path, holder, inside, end):
    place = tmp_path / "out"
    if inside:
        place.mkdir()
    process = holder(place, inside)
    with pytest.raises(UserError, match=rf"the output out is being written by process {process.pid} on \S+ \(-c"):
        with only_writer(place, "the output out", inside):
            pass
    process.send_signal(end)
    process.wait()
    with only_writer(place, "the output out", inside):
        pass
    with only_writer(place, "the output out", inside):  # and again, in one process
        pass
    assert [entry.name for entry in tmp_path.rglob("*") if "lock" in entry.name] == []


def test_a_command_that_writes_nothing_leaves_no_folder(tmp_path):
    with pytest.raises(ZeroDivisionError), only_writer(tmp_path / "new" / "deep" / "out", "out"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_that_nobody_holds_stops_nobody(tmp_path):
    (tmp_path / ".out.lock").write_text("cut off {")
    with only_writer(tmp_path / "out", "out"):
        with pytest.raises(UserError, match="out is being written by process"):
            with only_writer(tmp_path / "out", "out"):
                pass


def test_a_device_behind_a_link_is_refused_by_its_name(tmp_path):
    reader, writer = os.pipe()
    for device in ("/dev/null", f"/dev/fd/{writer}", f"/proc/self/fd/{reader}"):
        (tmp_path / "gate.json").unlink(missing_ok=True)
        (tmp_path / "gate.json").symlink_to(device)
        with pytest.raises(UserError, match=r"gate\.json.* is a device"):
            with only_writer(tmp_path / "gate.json", "the gate"):
                pass


def test_a_link_to_where_nothing_can_be_written_is_refused_by_its_name(tmp_path):
    (tmp_path / "gate.json").symlink_to("/proc/self/mem")
    for look in (lambda path: check_output(path, True), lambda path: only_writer(path, "the gate").__enter__()):
        with pytest.raises(UserError, match=r"gate\.json is a link: /proc/.* cannot be written"):
            look(tmp_path / "gate.json")


def test_a_lock_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "file").write_text("of the user")
    (tmp_path / ".out.lock").symlink_to("file")
    with pytest.raises(UserError, match=r"\.out\.lock is a link"):
        with only_writer(tmp_path / "out", "out"):
            pass
    assert (tmp_path / "file").read_text() == "of the user" and (tmp_path / ".out.lock").is_symlink()


def test_whole_files_appear_whole_and_failures_leave_nothing(tmp_path):
    path = tmp_path / "folder" / "a.txt"
    with whole(path) as file:
        file.write("one")
        assert not path.exists()
    assert path.read_text() == "one" and path.stat().st_mode & 0o777 == 0o666 & ~_umask()
    os.chmod(path, 0o600)
    with pytest.raises(ZeroDivisionError), whole(path) as file:
        file.write("two")
        raise ZeroDivisionError
    assert path.read_text() == "one" and len(list(path.parent.iterdir())) == 1
    with whole(path, "wb") as file:
        file.write(b"three")
    assert path.read_text() == "three" and path.stat().st_mode & 0o777 == 0o600


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    with whole(tmp_path / "link.txt") as file:
        file.write("new")
    assert (tmp_path / "link.txt").is_symlink() and (tmp_path / "real.txt").read_text() == "new"


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_what_dead_writers_left_is_removed_and_living_ones_stay(tmp_path):
    dead, alive, other = (tmp_path / name for name in (".out.writing-dead", ".out.writing-live", ".outer.writing-x"))
    for folder in (dead, alive, other):
        folder.mkdir()
        (folder / "part").write_text("x")
        os.utime(folder, (time.time() - 60,) * 2)
    with locked(alive):
        assert is_dead(dead) and not is_dead(alive)
        remove_dead(tmp_path / "out")
    assert not dead.exists() and alive.exists() and other.exists()


@pytest.mark.parametrize(
    "command, message",
    [
        ("evaluate --model_dir=m --questions=report/predictions.jsonl --output_dir=report", "is read by this command"),
        ("evaluate --model_dir=model --questions=q.jsonl --output_dir=old", "holds a predictions.jsonl"),
        ("index --corpus=index/own.tsv --index_dir=index", "lies in its output"),
        ("index --corpus=p.tsv --vocabulary=index/v.model --index_dir=index", "lies in its output"),
        ("index --corpus=p.tsv --retriever=index/retriever --index_dir=index", "lies in its output"),
        ("index --documents=index/texts --index_dir=index", "lies in its output"),
        ("mine --questions=q.jsonl --index_dir=index --output=index/passages.tsv.gz", "which this"),
        ("mine --questions=q.jsonl --index_dir=index --output=index/new.jsonl", "which this"),
        ("infer --model_dir=m --questions=q.jsonl --index_dir=index --output=index/manifest.json", "which this"),
        ("infer --model_dir=model --questions=q.jsonl --output=model/gate.json", "lies in"),
        ("infer --model_dir=model --questions=q.jsonl --output=model/checkpoints/3/_CHECKPOINT_METADATA", "lies in"),
        ("mine --questions=q.jsonl --index_dir=index --retriever=model --output=model/vocabulary/r.model", "lies in"),
        ("evaluate --model_dir=model --questions=q.jsonl --output_dir=model/checkpoints", "lies in"),
        ("export --model_dir=model --index_dir=export/index --export_dir=export", "lies in its output"),
    ],
)
def test_no_command_replaces_what_it_reads(tmp_path, monkeypatch, capsys, command, message):
    monkeypatch.chdir(tmp_path)
    for name in ("report/predictions.jsonl", "old/predictions.jsonl", "p.tsv", "q.jsonl", "model/gate.json",
                 "index/own.tsv", "index/v.model", "index/texts/a.txt", "index/passages.tsv.gz"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("of the user")
    for folder, format_name in (("index", INDEX), ("export", EXPORT)):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "manifest.json").write_text(f'{{"format": "{format_name}"}}')
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    overwrite = [] if "old" in command else ["--overwrite"]
    assert main([*command.split(), *overwrite]) == 2 and message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_job_is_known_by_the_system_too(tiny):
    model = open_model(tiny.model_dir)
    other = dataclasses.replace(model, system=dataclasses.replace(model.system, gate_hidden=3))
    keys = [job_key(service_from_model(each, "never"), b"questions", "predict") for each in (model, model, other)]
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize(
    "output, message",
    [
        ("questions.jsonl", "is read by this command"),
        ("linked.jsonl", "is read by this command"),
        ("hard.jsonl", "is read by this command"),
        ("there.jsonl", "exists: nothing was overwritten"),
        ("folder", "is a folder"),
        ("/dev/null", "is a device or a pipe"),
        ("fifo", "is a device or a pipe"),
        ("questions.jsonl/x", "is no folder"),
        ("/proc/x.jsonl", "cannot be (written|made)"),
        ("gs://b/x.jsonl", "gs:// cannot be read or written"),
    ],
)
def test_outputs_that_would_destroy_something_are_refused(tmp_path, monkeypatch, output, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "questions.jsonl").write_text("{}")
    (tmp_path / "there.jsonl").write_text("{}")
    (tmp_path / "linked.jsonl").symlink_to("questions.jsonl")
    os.link(tmp_path / "questions.jsonl", tmp_path / "hard.jsonl")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    for overwrite in (True, False) if output != "there.jsonl" else (False,):
        with pytest.raises(UserError, match=message):
            check_output(output, overwrite, inputs=["questions.jsonl", None])
    check_output("there.jsonl", True, inputs=["questions.jsonl"])
    check_output("new/deep/x.jsonl", False)


@pytest.mark.parametrize("tail", [b"", b'{"id": "3"', b"\xff\xfe\n", b"[" * 200000 + b"\n", b"[1]\n", b'{"id": "x"}\n'])
def test_a_damaged_partial_file_is_used_up_to_its_damage(tmp_path, monkeypatch, tail):
    monkeypatch.setattr("expertrag_jax.infer.CHUNK", 1)
    partial = tmp_path / "out.key.partial"
    good = "".join(json.dumps({"id": str(number)}) + "\n" for number in range(3)).encode()
    partial.write_bytes(good + tail)
    asked = [Question(str(number), "?") for number in range(9)]
    assert finished_questions(partial, asked) == 3 and partial.read_bytes() == good
