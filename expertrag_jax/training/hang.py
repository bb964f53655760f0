"""The hang watchdog: where no step is taken for long, the stacks of all threads say what the process waits for."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax

from expertrag_jax.files.writing import whole
from expertrag_jax.training.telemetry import Telemetry

EXIT_CODE = 75  # sysexits.h: a temporary failure, try again
PATIENCE = {  # times hang_seconds
    "startup": 4.0, "first batch": 4.0, "before checkpoint": 4.0, "compile": 4.0, "checkpoint": 4.0, "evaluation": 4.0,
}  # fmt: skip

_LOG = logging.getLogger(__name__)


class Watchdog:
    """A thread that looks at what the run is doing while it is entered.

    The clock starts anew with each step, and when a compilation, a checkpoint or an evaluation begins and ends; these,
    and the first batch of a phase, for which data may have to be made, may take ``PATIENCE`` times as long. One hang is
    told of once: the stacks of all threads go to standard error and ``logs/hang_<step>.txt`` (process i > 0:
    ``hang_<step>_<i>.txt``), and the run goes on waiting, or ends with exit code 75, so that a scheduler starts it
    again. The step is the last one that was begun.
    """

    def __init__(self, logs: str | Path, telemetry: Telemetry, seconds: float | None, abort: bool = False):
        """Args: logs: ``MODEL_DIR/logs``. seconds: without a step; None: nothing is watched. abort: end the process."""
        self._logs = Path(logs)
        self._telemetry = telemetry
        self._seconds = seconds
        self._abort = abort
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hang watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._seconds is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._end.set()
        if self._seconds is not None:
            self._thread.join()

    def _watch(self) -> None:
        told = None
        while not self._end.wait(min(5.0, self._seconds / 10)):
            doing, since = now = self._telemetry.goodput.doing
            silent = time.monotonic() - since
            if now != told and silent >= self._seconds * PATIENCE.get(doing, 1.0):
                self._tell(doing, silent)
                told = now

    def _tell(self, doing: str, silent: float) -> None:
        """Dumps the stacks to standard error first: the disk may be what hangs."""
        step = self._telemetry.step
        suffix = f"_{jax.process_index()}" if jax.process_index() else ""
        path = self._logs / f"hang_{step}{suffix}.txt"
        what = "no step was finished" if doing == "step" else f"'{doing}' has not ended"
        ending = f"the run ends with exit code {EXIT_CODE}" if self._abort else "the run goes on waiting"
        line = f"Since step {step} {what} for {silent:.0f} s: the stacks of all threads are in {path}; {ending}."
        _LOG.error("%s", line)
        faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        try:
            with whole(path) as file:
                file.write(line + "\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            _LOG.error("%s cannot be written: %s", path, error.strerror)
        if self._abort:
            os._exit(EXIT_CODE)
