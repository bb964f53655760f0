"""SIGTERM: what a scheduler sends before it takes the machine away. A flag, looked at after each step."""

from __future__ import annotations

import signal
import threading
from typing import Any

import jax
from absl import logging
from jax.experimental import multihost_utils


class Interrupted(SystemExit):
    """The run was asked to stop, has saved its state, and ends with exit code 0."""

    def __init__(self, step: int):
        super().__init__(0)
        self.step = step


class Interruption:
    """While entered, SIGTERM sets a flag instead of killing the process.

    With several processes JAX's own preemption service does it: it agrees on one step that all of them have
    yet to reach, and every process sees the flag at that step.
    """

    def __init__(self) -> None:
        self._flag = threading.Event()
        self._previous: Any = None
        self._own_handler = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Interruption:
        if self._own_handler:
            self._previous = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._own_handler:
            signal.signal(signal.SIGTERM, self._previous or signal.SIG_DFL)

    def _handle(self, *_: Any) -> None:
        self._flag.set()

    def requested(self, step: int) -> bool:
        """Whether to save and stop after this step; the same answer in every process."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        if self._flag.is_set():
            logging.info("SIGTERM: saving at step %d", step)
        return self._flag.is_set()
