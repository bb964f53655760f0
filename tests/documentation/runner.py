"""Runs the commands of a page as their reader would type them, in the folder where the commands before have written.

Bash takes the statement apart, so that loops, quotes and variables mean what they mean, and writes down what it would
start of PROGRAMS. A worker runs these one after the other in one process with one CPU device, for loading the libraries
takes longer than a small command.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PROGRAMS = ("expertrag", "python", "make")
WRITE_DOWN = "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))"
SET_BY_BASH = {"_", "OLDPWD", "PWD", "SHLVL"}
TIMEOUT = 900  # seconds for a process of its own


class Runner:
    """Runs commands; its worker is started by the first one and ended by ``close``.

    Attributes:
      environment: of every command.
      output: file of what the commands print.
    """

    def __init__(self, environment: dict[str, str]):
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path, **environment}
        self.output = tempfile.TemporaryFile("a+")
        self._worker: subprocess.Popen | None = None

    def run(self, folder: Path, statement: str, more: str = "", apart=False, codes: Sequence[int] = (0,)) -> None:
        """Runs a statement of bash.

        Args:
          folder: where it is typed.
          statement: as it stands on its page.
          more: appended to every program that it starts, in the words of a shell, see ``small.py``.
          apart: as processes of their own, all at once.
          codes: exit codes that mean success.

        Raises:
          AssertionError: it ended with another exit code; the message has the end of what was printed.
        """
        start = self.output.seek(0, os.SEEK_END)
        words = shlex.split(more.replace("{port}", str(free_port())).replace("{here}", str(HERE)))
        started = [([*recipe(list_), *words], env) for list_, env in self.started_by(folder, statement)]
        if apart:
            ended = self._together(folder, started)
        else:
            for _, env in started:
                changed = {name for name in env if env[name] != self.environment.get(name)} - SET_BY_BASH
                assert not changed, f"{statement}\nsets {changed}, which needs a process of its own: run it Apart"
            ended = [self._in_worker(folder, arguments) for arguments, _ in started]
        if not set(ended) <= set(codes):
            raise AssertionError(f"{statement} {more}\nended with {ended}:\n{self._printed(start)}")

    def run_python(self, folder: Path, program: str) -> None:
        """Runs a Python program in the folder."""
        start = self.output.seek(0, os.SEEK_END)
        if self._in_worker(folder, ["python", "-c", program]):
            raise AssertionError(f"{program}\nfailed:\n{self._printed(start)}")

    def close(self) -> None:
        """Ends the worker."""
        if self._worker is not None:
            self._worker.stdin.close()
            self._worker.wait(TIMEOUT)

    def _printed(self, start: int) -> str:
        self.output.seek(start)
        return self.output.read()[-3000:]

    def started_by(self, folder: Path, statement: str) -> list[tuple[list[str], dict[str, str]]]:
        """Argument list and environment of each of PROGRAMS that a statement starts; others are run."""
        functions = [f'{name}() {{ "{sys.executable}" -ISc \'{WRITE_DOWN}\' {name} "$@"; }}' for name in PROGRAMS]
        script = "\n".join(["set -eu", *functions, statement])
        done = subprocess.run(
            ["bash", "-c", script], env=self.environment, cwd=folder, stdout=subprocess.PIPE, stderr=self.output
        )
        if done.returncode:
            raise AssertionError(f"{statement}\nended with {done.returncode}:\n{self._printed(0)}")
        return [tuple(json.loads(line)) for line in done.stdout.splitlines()]

    def _together(self, folder: Path, started: Sequence[tuple[list[str], dict[str, str]]]) -> list[int]:
        with contextlib.ExitStack() as stack:
            processes = []
            for (program, *arguments), environment in started:
                assert program == "expertrag", f"{program} cannot be run apart"
                command = [sys.executable, "-m", "expertrag_jax", *arguments]
                # Of a flag that is there twice, the page's holds.
                flags = f"{self.environment['XLA_FLAGS']} {environment['XLA_FLAGS']}"
                printed = {"stdout": self.output, "stderr": self.output}
                processes.append(
                    subprocess.Popen(command, env=environment | {"XLA_FLAGS": flags}, cwd=folder, **printed)
                )
                stack.callback(processes[-1].kill)
            return [process.wait(TIMEOUT) for process in processes]

    def _in_worker(self, folder: Path, arguments: Sequence[str]) -> int:
        if self._worker is None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.output}
            self._worker = subprocess.Popen([sys.executable, __file__], env=self.environment, text=True, **pipes)
        self._worker.stdin.write(json.dumps([str(folder), list(arguments)]) + "\n")
        self._worker.stdin.flush()
        return int(self._worker.stdout.readline() or "-1")


def recipe(arguments: list[str]) -> list[str]:
    """The arguments; of ``make <target>``, those of the `expertrag` command that the target runs after the set-up."""
    if arguments[0] != "make":
        return arguments
    make = ["make", "--no-print-directory", "--dry-run", "-C", str(ROOT), *arguments[1:]]
    printed = subprocess.run(make, capture_output=True, text=True, check=True).stdout
    (line,) = [line for line in printed.splitlines() if line.startswith(".venv/bin/expertrag ")]
    return ["expertrag", *shlex.split(line)[1:]]


def free_port() -> int:
    """Returns a free port of this machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def call(program: str, *arguments: str) -> int:
    """Runs `expertrag` or `python` in this process and returns the exit code."""
    if program == "expertrag":
        from expertrag_jax.main import main

        return main(arguments)
    assert program == "python", f"the worker does not run {program}"
    try:
        if arguments[0] == "-c":
            exec(compile(arguments[1], "<page>", "exec"), {"__name__": "__main__"})
        elif arguments[0] == "-m":
            sys.argv = list(arguments[1:])
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(arguments)
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as stop:
        return stop.code or 0
    return 0


def work() -> None:
    """The worker: a line of input is a folder and an argument list, a line of output is an exit code."""
    import traceback

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what programs print goes to standard error
    for line in sys.stdin:
        folder, arguments = json.loads(line)
        os.chdir(folder)
        try:
            code = call(*arguments)
        except Exception:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        print(code, file=answers, flush=True)


if __name__ == "__main__":
    work()
