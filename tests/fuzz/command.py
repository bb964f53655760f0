"""Runs a command in a process of its own, from one that has the libraries loaded."""

from __future__ import annotations

import dataclasses
import hashlib
import multiprocessing
import os
import resource
import signal
import sys
import time
from pathlib import Path

LIBRARIES = [
    "expertrag_jax.main", "expertrag_jax.index", "expertrag_jax.mine", "expertrag_jax.train", "expertrag_jax.evaluate",
    "expertrag_jax.infer", "expertrag_jax.answer", "expertrag_jax.calibrate", "expertrag_jax.export",
    "expertrag_jax.demo", "seqio", "scann",
]  # fmt: skip
"""Libraries that load slowly and start no threads. bm25s is not one of them: it starts JAX's, which a fork breaks."""
MEMORY = 8 << 30  # bytes; a damaged file that makes a command ask for more shows as a fault

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(LIBRARIES)


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
      code: its exit code; None if it was killed because it took too long; negative for a signal.
      printed: standard output and standard error.
      before: {path: digest} of the files in its folder when it began.
      after: the same at its end.
      seconds: that it took.
    """

    code: int | None
    printed: str
    before: dict[str, str]
    after: dict[str, str]
    seconds: float


def run_command(arguments: list[str], folder: Path, seconds: float) -> Ended:
    """Runs ``expertrag ARGUMENTS`` in a folder, with an empty standard input."""
    log = folder.with_name(f"{folder.name}.log")
    before = digests(folder)
    began = time.monotonic()
    process = _context.Process(target=_work, args=(arguments, str(folder), str(log)))
    process.start()
    process.join(seconds)
    hung = process.is_alive()
    if hung:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    printed = log.read_text(errors="backslashreplace")
    log.unlink()
    took = time.monotonic() - began
    return Ended(None if hung else process.exitcode, printed, before, digests(folder), took)


def digests(folder: Path) -> dict[str, str]:
    """{path: digest} of every plain file and link below a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _work(arguments: list[str], folder: str, log: str) -> None:
    os.setsid()
    os.chdir(folder)
    with open(log, "wb") as file, open(os.devnull, "rb") as nothing:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        os.dup2(nothing.fileno(), 0)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, mode) for number, mode in ((0, "r"), (1, "w"), (2, "w")))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from expertrag_jax.main import main

    code = main(arguments)
    sys.stdout.flush()
    sys.exit(code)
