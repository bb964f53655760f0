"""Whole commands beside a rival, on disks that are full or read-only, and after an upgrade: nothing is lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from expertrag_jax.main import main
from expertrag_jax.training import integrity
from expertrag_jax.training.pretrained import read_metadata

pytestmark = pytest.mark.usefixtures("fast_compile")
COUNT = 600


@pytest.fixture(scope="module")
def files(tiny, tiny_model, tmp_path_factory):
    """Copies of the tiny model, a corpus, questions, a dual encoder and a BM25 index; `commands` names them."""
    folder = tmp_path_factory.mktemp("files")
    for name in ("model", "index"):
        shutil.copytree(tiny.root / name, folder / name)
    shutil.copy(tiny.root / "vocabulary.model", folder)
    passages = tiny_model.passages()
    rows = zip(passages.ids, passages.texts, passages.titles)
    (folder / "corpus.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
    names = tiny_model.NAMES
    records = [
        {"id": f"q{n}", "question": f"Where does {names[n % 15]} live?", "answers": ["Arlen"],
         "gold_passage_ids": [f"e{n % 15}"]} for n in range(COUNT)
    ]  # fmt: skip
    (folder / "questions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    tiny_model.write_retriever(folder / "retriever", tiny)
    return folder


def commands(files, place) -> dict[str, list[str]]:
    """Right commands, each with an output of its own in ``place``."""
    asked, vocabulary = f"--questions={files}/questions.jsonl", f"{files}/vocabulary.model"
    model = [f"--model_dir={files}/model", f"--index_dir={files}/index"]
    fast = ["--gin.evaluate.evaluate.buckets=(4,)", "--gin.evaluate.evaluate.rounds=1"]
    gin_files = [f"--gin_file={name}.gin" for name in ("runs/train", "models/t5_tiny", "systems/closed_book")]
    sizes = ("embed_dim=16", "mlp_dim=32", "num_heads=2", "head_dim=8", "num_encoder_layers=1", "num_decoder_layers=1")
    return {
        "index": ["index", f"--corpus={files}/corpus.tsv", f"--vocabulary={vocabulary}", f"--index_dir={place}/bm25"],
        "mine": ["mine", asked, model[1], f"--retriever={files}/retriever", f"--output={place}/mined.jsonl"],
        "infer": ["infer", *model, asked, f"--output={place}/answers.jsonl", "--buckets=4"],
        "evaluate": ["evaluate", *model, asked, f"--output_dir={place}/report", *fast],
        "export": ["export", *model, f"--export_dir={place}/export", "--platforms=cpu", "--buckets=2"],
        "train": [
            "train", *gin_files, f"--gin.QUESTIONS='{files}/questions.jsonl'", f"--gin.VOCABULARY='{vocabulary}'",
            f"--model_dir={place}/run", "--gin.BATCH_SIZE=8", "--gin.TRAIN_STEPS=2", "--gin.train.train.log_period=1",
            "--gin.TASK_FEATURE_LENGTHS={'inputs': 24, 'targets': 8, 'query': 24}",
            *(f"--gin.config.TransformerConfig.{size}" for size in sizes),
        ],
    }  # fmt: skip


@pytest.fixture
def environment(compiled_programs):
    """Of processes that share compiled programs with the tests."""
    return os.environ | {
        "JAX_COMPILATION_CACHE_DIR": compiled_programs,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


@pytest.mark.parametrize("name, lock", [("infer", ".answers.jsonl.lock"), ("train", "run/.lock")])
def test_of_two_equal_jobs_one_runs_and_the_other_is_refused(files, tmp_path, environment, capfd, name, lock):
    arguments = commands(files, tmp_path)[name]
    with open(tmp_path / "log", "w") as log:
        command = [sys.executable, "-m", "expertrag_jax", *arguments]
        first = subprocess.Popen(command, env=environment, stderr=log, stdout=log)
    try:
        while not (tmp_path / lock).exists() and first.poll() is None:
            time.sleep(0.005)
        os.kill(first.pid, signal.SIGSTOP)  # in the middle of its work
        assert main(arguments) == 2
        (error,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        assert f"is being written by process {first.pid} on " in error
        os.kill(first.pid, signal.SIGCONT)
        assert first.wait(300) == 0, (tmp_path / "log").read_text()
    finally:
        first.kill()
    if name == "infer":
        ids = [json.loads(line)["id"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
        assert ids == [f"q{number}" for number in range(COUNT)]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "log"]
    else:
        logged = (tmp_path / "run" / "logs" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in logged] == [1, 2]


RUN_ALL = """
import contextlib, io, json, os, sys
from expertrag_jax.main import main
place, commands = json.loads(sys.argv[1])
ended = {}
for name, arguments in commands.items():
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
        code = main(arguments)
    ended[name] = [code, told.getvalue(), sorted(os.listdir(place))]
print(json.dumps(ended))
"""


@pytest.fixture
def on_a_disk(tmp_path, environment):
    """``run(prepare, commands)``: how each command ended in a small file system at ``tmp_path / "disk"``."""
    disk = tmp_path / "disk"
    disk.mkdir()
    own = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=256k x {disk}"
    try:
        possible = subprocess.run([*own, mount], capture_output=True, timeout=20)
    except FileNotFoundError:
        pytest.skip("unshare is not installed")
    if possible.returncode:
        pytest.skip(f"no file system of one's own here: {possible.stderr.decode()}")

    def run(prepare, given):
        script = f'{mount} && {prepare} && exec {sys.executable} -c "$0" "$1"'
        argument = json.dumps([str(disk), given])
        done = subprocess.run([*own, script, RUN_ALL, argument], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return disk, run


def summary(ended, message) -> dict:
    """{command: (exit code, whether its one error holds the message, what it left)}

    Left out: what is resumed, and the temporary folder in which Orbax's threads still write after an export has failed.
    The next export removes it.
    """
    found = {}
    for name, (code, told, left) in ended.items():
        errors = [line for line in told.splitlines() if line.startswith("error: ")]
        right = len(errors) == 1 and message in errors[0] and "Traceback" not in told
        kept = [file for file in left if file != "run" and not re.search(r"\.partial$|^\.export\.writing-", file)]
        found[name] = (code, right or told[-2000:], kept)
    return found


def test_every_command_refuses_a_disk_that_can_only_be_read(files, on_a_disk):
    disk, run = on_a_disk
    given = commands(files, disk)
    ended = run(f"mount -o remount,ro {disk}", given)
    assert summary(ended, "Read-only file system") == {name: (2, True, []) for name in given}


def test_every_command_says_that_the_disk_is_full(files, on_a_disk):
    disk, run = on_a_disk
    given = commands(files, disk)
    ended = run(f"dd if=/dev/zero of={disk}/others bs=4k 2>/dev/null; true", given)
    assert summary(ended, "The disk is full") == {name: (2, True, ["others"]) for name in given}


MODULES = {"ClosedBook": "systems.closed_book", "TransformerConfig": "model.config"}


def as_earlier_releases_wrote(description: dict) -> dict:
    """A description with classes by module, and without a field that is new."""
    fields = {
        name: as_earlier_releases_wrote(value) if isinstance(value, dict) else value
        for name, value in description["fields"].items()
        if name != "attention_init"
    }
    return {"class": f"expertrag_jax.{MODULES[description['class']]}:{description['class']}", "fields": fields}


def test_a_checkpoint_of_an_earlier_release_resumes_to_the_bit_and_answers(files, tmp_path):
    new, old = tmp_path / "new" / "run", tmp_path / "old" / "run"
    assert main(commands(files, new.parent)["train"]) == 0
    shutil.copytree(new.parent, old.parent)
    path = old / "checkpoints" / "2" / "_CHECKPOINT_METADATA"
    stored = json.loads(path.read_text())
    ours = stored["custom_metadata"]
    del ours["checksum"]
    ours["system"] = as_earlier_releases_wrote(ours["system"])
    assert "expertrag_jax.model.config:TransformerConfig" in json.dumps(ours)
    path.write_text(json.dumps(stored | {"custom_metadata": integrity.sealed(ours)}))
    answers = []
    for model in (new, old):
        assert main([*commands(files, model.parent)["train"], "--gin.TRAIN_STEPS=4"]) == 0
        asked = [f"--questions={files}/questions.jsonl", f"--output={model.parent}/answers.jsonl", "--buckets=64"]
        assert main(["infer", f"--model_dir={model}", *asked]) == 0
        answers.append((model.parent / "answers.jsonl").read_text())
    ends = [read_metadata(model / "checkpoints" / "4") for model in (new, old)]
    assert ends[0] == ends[1] and ends[0]["system"]["class"] == "ClosedBook"  # fingerprints of every array among them
    assert answers[0] == answers[1]
