"""The command line: flags, gin files, precedence, errors as one sentence, exit codes, several processes."""

import asyncio
import functools
import os
import pathlib
import socket
import subprocess
import sys
import textwrap
import types

import gin
import pytest

from expertrag_jax import gin_files, launch, main
from expertrag_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent

JOB = '''
"""Adds up a model.

A toy for the tests of the launcher.
"""
from __future__ import annotations
from collections.abc import Sequence
from expertrag_jax.errors import QualityMissed, UserError

FLAGS = {
    "--out_dir": ("out_dir", "where to write, 100% of it"),
    "--steps": ("steps", "how long"),
    "--seeds": ("seeds", "repeatable"),
    "--fast": ("fast", "less"),
    "--width": ("WIDTH", "a macro"),
    "--depth": ("toy_job.Model.depth", "a gin parameter"),
    "question": ("question", "what to ask"),
}
EXAMPLE = "toy --out_dir=x"
calls = []

class Model:
    def __init__(self, width: int, depth: int = 2):
        if depth > 9:
            raise UserError(f"depth {depth} is over 9: lower it.")
        self.width, self.depth = width, depth

def toy_job(out_dir: str, model: Model | None = None, steps: int | None = 3, seeds: Sequence[int] = (),
            fast: bool = False, question: str | None = None):
    size = model and (model.width, model.depth)
    calls.append({**locals(), "seeds": list(seeds)})
    del calls[-1]["model"]
    if question == "interrupt":
        raise KeyboardInterrupt
    if question == "missing":
        open(out_dir)
    if question == "worse":
        raise QualityMissed("1 of 2 promises on quality.")
    if question == "defect":
        raise IndexError("a defect")
    if question in ("processes", "alone"):
        import jax
        print("process", jax.process_index(), "of", jax.process_count())
    if question == "alone":
        from jax.experimental import multihost_utils
        if jax.process_index() == 1:
            raise UserError("this host lacks a file: copy it.")
        multihost_utils.sync_global_devices("waits for process 1")

if __name__ == "__main__":
    from expertrag_jax import launch
    launch.run("toy_job")
'''
BASE = """
from __gin__ import dynamic_registration
import toy_job
OUT = %gin.REQUIRED
WIDTH = 4
toy_job.toy_job.out_dir = %OUT
toy_job.toy_job.model = @toy_job.Model()
toy_job.Model.width = %WIDTH
"""
RUN = """
from __gin__ import dynamic_registration
import __main__ as train_script
include 'base.gin'
train_script.toy_job:
  steps = 7
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the toy job and its gin files, importable."""
    path = tmp_path_factory.mktemp("launch")
    (path / "toy_job.py").write_text(JOB)
    (path / "base.gin").write_text(BASE)
    (path / "run.gin").write_text(RUN)
    sys.path.insert(0, str(path))
    yield path
    sys.path.remove(str(path))
    gin.clear_config()


@pytest.fixture
def toy(folder, monkeypatch, capsys):
    """Runs the toy job in its folder: arguments -> (exit code, what it was called with, stdout, stderr)."""
    monkeypatch.chdir(folder)
    import toy_job

    def run(*arguments):
        toy_job.calls.clear()
        code = launch.execute("toy_job", arguments)
        output = capsys.readouterr()
        return code, (toy_job.calls or [None])[-1], output.out, output.err

    return run


def call(**values):
    default = dict(out_dir="x", size=None, steps=3, seeds=[], fast=False, question=None)
    return {**default, **values}


def gin_file(folder, text, name="case.gin"):
    (folder / name).write_text("from __gin__ import dynamic_registration\nimport toy_job\n" + text)
    return f"--gin_file={name}"


def test_gin_files_then_command_line_then_flags(toy):
    assert toy("--gin_file=run.gin", "--gin.OUT='x'")[1] == call(size=(4, 2), steps=7)
    assert toy("--gin_file=run.gin", "--gin.OUT='x'", "--gin.WIDTH=5")[1] == call(size=(5, 2), steps=7)
    assert toy("--gin_file=run.gin", "--gin.OUT=x", "--gin.toy_job.toy_job.steps=8")[1]["steps"] == 8
    assert (
        toy("--gin_file=run.gin", "--gin.OUT=x", "--gin.toy_job.toy_job.steps=8", "--steps=9")[1]["steps"]
        == 9
    )
    assert toy("--gin_file=run.gin", "--gin_bindings=OUT = 'y'", "--width=6", "--depth=3")[1] == call(
        out_dir="y", size=(6, 3), steps=7
    )


def test_later_files_override(toy, folder):
    later = gin_file(folder, "toy_job.toy_job.steps = 11\n", "later.gin")
    assert toy("--gin_file=run.gin", later, "--gin.OUT=x")[1]["steps"] == 11
    assert toy(later, "--gin_file=run.gin", "--gin.OUT=x")[1]["steps"] == 7


def test_flags_alone_are_read_by_annotation(toy):
    code, called, _, _ = toy("--out_dir", "7", "--seeds=1", "--seeds=2", "--fast", "1984, 'who'?")
    assert (code, called) == (0, call(out_dir="7", seeds=[1, 2], fast=True, question="1984, 'who'?"))
    assert toy("--out_dir=x", "--fast=false", "True")[1] == call(question="True")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("runs/a-1", "'runs/a-1'"),
        ("'runs/a'", "'runs/a'"),
        ("1e-3", "1e-3"),
        ("{'inputs': 3}", "{'inputs': 3}"),
        ("None", "None"),
        ("%OTHER", "%OTHER"),
        ("@a.b()", "@a.b()"),
        ("[@a.b, 1]", "[@a.b, 1]"),
        ("nq open", "'nq open'"),
    ],
)
def test_words_need_no_quotes(text, value):
    from expertrag_jax import job_flags

    assert job_flags.gin_value("X", text) == value


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gin_file=run.gin"], ["OUT must be set", "base.gin:4", "--gin.OUT=VALUE"]),
        (["--gin_file=rum.gin"], ["gin file rum.gin is not in", "'run.gin'"]),
        (["--gin_file=run.gin", "--gin.OTU=x"], ["the macro OTU", "run.gin", "did you mean 'OUT'?"]),
        (["--gin.OUT=x"], ["the macro OUT", "no --gin_file is given"]),
        (["--gin_file=run.gin", "--gin.OUT=x", "--gin.toy_job.Model.widht=3"], ["'widht'", "'width'"]),
        (["--gin_file=run.gin", "--gin.OUT=x", "--gin.toy_job.Modle.depth=3"], ["mean 'toy_job.Model'?"]),
        (["--gin_file=run.gin", "--gin.OUT=x", "--gin.WIDTH=[3"], ["command line", "not closed"]),
        (["--gin_file=run.gin", "--gin.OUT=x", "--gin.WIDTH=true"], ["write True"]),
        (["--gin_file=run.gin", "--gin.OUT=x", "--gin.WIDTH"], ["--gin.WIDTH=VALUE"]),
        (["--gin_file=run.gin", "--gin.OUT=x", "--depth=12"], ["depth 12 is over 9: lower it."]),
        (["--steps=3"], ["toy_job has no value for --out_dir"]),
        (["--out_dir=x", "--steps=three"], ["--steps", "'three'"]),
        (["--out_dir=x", "--fast=maybe"], ["--fast is true or false"]),
        (["--out_dir=x", "--bogus"], ["--bogus"]),
        (["--out_dir=absent/file", "missing"], ["No such file or directory", "absent/file"]),
        (["--out_dir=x", "--process_count=2"], ["--coordinator_address", "belong together"]),
        (["--coordinator_address=a:1", "--process_count=2", "--process_index=2"], ["are 0 to 1"]),
    ],
)  # fmt: skip
def test_bad_arguments(toy, arguments, words):
    check_error(toy(*arguments), words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("toy_job.toy_job.stesp = 3\n", ["case.gin:3", "no parameter 'stesp'", "'steps'", "it has out_dir"]),
        ("toy_job.toy_jbo.steps = 3\n", ["case.gin:3", "toy_job has nothing called 'toy_jbo'", "'toy_job'"]),
        ("toy_jab.toy_job.steps = 3\n", ["case.gin:3", "does not import 'toy_jab'", "'toy_job'"]),
        ("toy_job.toy_job.model = @toy_job.Modle()\n", ["case.gin:3", "'Modle'", "'Model'"]),
        ("OUTS = 'x'\ntoy_job.toy_job.out_dir = %OUT\n", ["%OUT is used", "case.gin:4", "'OUTS'"]),
        ("toy_job.toy_job.seeds = [1,\n  2\n", ["case.gin", "not closed"]),
        ("toy_job.toy_job.seeds = 1 2\n", ["case.gin:3", "cannot read", "toy_job.toy_job.seeds = 1 2"]),
        ("toy_job.toy_job.out_dir = x\n", ["case.gin:3", "cannot read"]),
        ("import expertrag_jax.no_such\n", ["case.gin:3", "import expertrag_jax.no_such", "fails"]),
        ("include 'models/none.gin'\n", ["case.gin:3", "models/none.gin", "no such gin file"]),
        ("toy_job.toy_job.out_dir = 'x'\ntoy_job.toy_job.model = @toy_job.Model()\n", ["'width' of Model."]),
        ("\ntoy_job.Model.width = %gin.REQUIRED\n", ["Model.width must be set", "case.gin:4"]),
    ],
)  # fmt: skip
def test_bad_gin_file(toy, folder, text, words):
    check_error(toy(gin_file(folder, text)), words)


def check_error(result, words):
    code, _, _, stderr = result
    assert code == 2
    assert stderr.count("\n") == 1 and stderr.startswith("error: "), stderr
    assert "Traceback" not in stderr
    for word in words:
        assert word in stderr, stderr


def test_debug_shows_the_traceback(toy):
    _, _, _, stderr = toy("--out_dir=x", "--steps=three", "--debug")
    assert "Traceback" in stderr and stderr.splitlines()[-1].startswith("error: ")


def test_interrupt_and_defect(toy):
    assert toy("--out_dir=x", "interrupt")[0] == 130
    with pytest.raises(IndexError, match="a defect"):
        toy("--out_dir=x", "defect")


def test_a_result_below_what_the_job_promises_is_one_sentence_and_exit_code_3(toy):
    code, _, _, err = toy("--out_dir=x", "worse")
    assert (code, err) == (3, "missed: 1 of 2 promises on quality.\n")


def test_run_exits_with_the_code(toy):
    with pytest.raises(SystemExit) as stop:
        launch.run("toy_job", ["--bogus"])
    assert stop.value.code == 2
    assert launch.run("toy_job", ["--out_dir=x"]) is None


def test_dry_run_prints_a_gin_file_and_starts_nothing(toy, folder):
    code, called, stdout, _ = toy("--gin_file=run.gin", "--gin.OUT=x", "--seeds=3", "--dry_run")
    assert (code, called) == (0, None)
    assert "would run toy_job.toy_job" in stdout and "fast = False (default)" in stdout
    (folder / "again.gin").write_text(stdout)
    assert toy("--gin_file=again.gin")[1] == call(size=(4, 2), steps=7, seeds=[3])


def test_help_names_flags_macros_and_example(toy):
    code, called, stdout, _ = toy("--help")
    assert (code, called) == (0, None)
    for words in (
        "Adds up a model.",
        "--out_dir",
        "100% of it",
        "--gin_file",
        "MODEL_DIR",
        "toy --out_dir=x",
    ):
        assert words in stdout


def test_gin_files_are_found_by_search_path(toy, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert toy(f"--gin_file={folder}/base.gin", "--gin.OUT=x")[0] == 0
    check_error(toy("--gin_file=run.gin", "--gin.OUT=x"), ["gin file run.gin"])
    assert toy("--gin_file=run.gin", "--gin.OUT=x", f"--gin_search_paths={tmp_path},{folder}")[0] == 0


@pytest.mark.parametrize("place", ["site/expertrag_jax/gin", "site/gin"])
def test_installed_gin_files_are_on_the_default_search_path(tmp_path, monkeypatch, place):
    (tmp_path / "site/expertrag_jax").mkdir(parents=True)
    (tmp_path / "site/gin").mkdir()
    (tmp_path / "site/gin/config.py").touch()  # gin-config itself lies there when installed
    assert gin_files.installed_folder(tmp_path / "site/expertrag_jax") is None
    (tmp_path / place / "runs").mkdir(parents=True)
    (tmp_path / place / "runs/a.gin").touch()
    found = gin_files.installed_folder(tmp_path / "site/expertrag_jax")
    assert found == str(tmp_path / place)
    monkeypatch.setattr(gin_files, "installed_folder", lambda: found)
    assert gin_files.search_paths(["a", "b", "a"]) == ["a", "b", os.getcwd(), found]


def test_a_second_parse_forgets_the_first(toy):
    assert toy("--gin_file=run.gin", "--gin.OUT=x")[1]["steps"] == 7
    assert toy("--out_dir=x")[1] == call()


def test_flags_that_name_no_parameter_are_a_defect(toy, monkeypatch):
    import toy_job

    monkeypatch.setitem(toy_job.FLAGS, "--other", ("other", ""))
    with pytest.raises(TypeError, match="no parameter other"):
        toy("--help")


def test_missing_package_is_one_sentence():
    assert launch.explain(ModuleNotFoundError("No module named 'seqio'", name="seqio")) == (
        "this needs the package seqio, which is not installed here."
    )
    assert launch.explain(ModuleNotFoundError("", name="expertrag_jax.gone")) is None
    assert launch.explain(UserError("one\n  two")) == "one two"


def test_commands_are_listed_and_mistyped_ones_refused(capsys):
    assert main.main([]) == 0
    listed = capsys.readouterr().out
    for name, (job, summary) in main.COMMANDS.items():
        path = ROOT / (job.partition(":")[0].replace(".", "/") + ".py")
        assert (f"  {name} " in listed and summary in listed) == path.exists()
    assert main.main(["trian"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: expertrag has no command 'trian'") and error.count("\n") == 1
    assert main.main(["--version"]) == 0


def test_late_callbacks_of_a_failed_read_are_left_out_and_nothing_else(capsys, monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    launch.log_to_stderr()
    loop = asyncio.new_event_loop()
    loop.close()

    def told(function) -> str:
        try:
            function()
        except Exception as error:
            trace = error.__traceback__.tb_next  # from the callback on, as C++ calls it
            fields = {"exc_type": type(error), "exc_value": error, "exc_traceback": trace}
            sys.unraisablehook(types.SimpleNamespace(**fields, err_msg=None, object=None))
        return capsys.readouterr().err

    monkeypatch.setattr(sys, "__unraisablehook__", lambda told: print(told.exc_value, file=sys.stderr))
    assert told(functools.partial(loop.call_soon_threadsafe, print)) == ""
    assert told(_fails) == "of another kind\n"


def _fails():
    raise RuntimeError("of another kind")


def test_every_command_has_help_and_a_valid_flag_table():
    import importlib

    from expertrag_jax import job_flags

    for name, (job_name, _) in main.available().items():
        job, function = launch.load(job_name)
        text = job_flags.make_parser(f"expertrag {name}", job, function).format_help()
        assert job.__doc__.strip().splitlines()[0] in text, name
        assert importlib.import_module(job_name.partition(":")[0]) is job


def start_two(folder, *arguments):
    """[(exit code, stdout, stderr)] of two processes of one job; they end within two minutes."""
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{port.getsockname()[1]}"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    flags = ["--out_dir=x", f"--coordinator_address={address}", "--process_count=2", *arguments]
    command = [sys.executable, "-m", "toy_job", *flags]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    processes = [subprocess.Popen([*command, f"--process_index={i}"], **streams) for i in range(2)]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def test_several_processes(folder):
    ended = start_two(folder, "processes")
    assert [(code, out) for code, out, _ in ended] == [(0, "process 0 of 2\n"), (0, "process 1 of 2\n")]


def test_when_one_process_has_an_error_the_others_end_too(folder):
    (waiting, _, told), (refused, _, error) = start_two(folder, "alone", "--heartbeat_seconds=5")
    assert (refused, error) == (2, "process 1: error: this host lacks a file: copy it.\n")
    assert waiting not in (0, None) and "1" in told


def test_module_and_command_agree(folder):
    """`python -m job` runs the imported job, not the copy that is __main__; stdout is the job's alone."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    code = textwrap.dedent("""
        import runpy, sys
        sys.argv = ["toy_job", "--gin_file=run.gin", "--gin.OUT=x"]
        runpy.run_module("toy_job", run_name="__main__", alter_sys=True)
        print(sys.modules["toy_job"].calls)
    """)
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert "'size': (4, 2)" in result.stdout and "'steps': 7" in result.stdout
