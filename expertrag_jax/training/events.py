"""TensorBoard's file of events, written by the thread that logs.

``tensorboardX.SummaryWriter`` writes in a thread that ends without a word where a disk is full, and whoever adds to its
queue then waits for ever. Here the error is raised where it happens.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

_FLUSH_SECONDS = 120.0  # each flush is an fsync, which a network file system takes its time for
_POSITIVE = 1e-12 * 1.1 ** np.arange(775)  # TensorBoard's own borders, to 1e20
_BORDERS = np.concatenate([-_POSITIVE[::-1], [0.0], _POSITIVE])


class Events:
    """One file; every method raises OSError where it cannot be written."""

    def __init__(self, directory: Path, step: int):
        """Args: step: of the run; what earlier files hold beyond it is no longer shown."""
        self._writer = EventsWriter(str(directory / "events"))
        self._flushed = time.monotonic()
        if step:
            self._add(step + 1, file_version="brain.Event:2")
            self._add(step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, name: str, value: Any, step: int) -> None:
        """A number, or any nest of lists of them: their histogram, maximum and mean."""
        if isinstance(value, list):
            values = np.ravel(value)
            self._add(step, summary=summary.histogram(name, values, _BORDERS))
            self.write(f"{name}/max", float(np.max(values)), step)
            self.write(f"{name}/mean", float(np.mean(values)), step)
        else:
            self._add(step, summary=summary.scalar(name, value))

    def close(self) -> None:
        """Writes what is still in memory."""
        try:
            self._writer.close()
        except OSError:
            # Or the file would be closed once more when it is deleted, and from Python 3.13 on the error be told again.
            self._writer._py_recordio_writer._writer.raw.close()
            raise

    def _add(self, step: int, **content: Any) -> None:
        self._writer.write_event(Event(wall_time=time.time(), step=step, **content))
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._flushed = time.monotonic()
            self._writer.flush()
