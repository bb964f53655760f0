"""What a run tells: ``logs/metrics.jsonl``, TensorBoard summaries, a log line, and where the time went."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from expertrag_jax import disk
from expertrag_jax.files.writing import whole
from expertrag_jax.partitioning import path_name
from expertrag_jax.training.events import Events
from expertrag_jax.training.goodput import Goodput, repeated_seconds
from expertrag_jax.training.log import read_lines

Progress = Callable[[Mapping[str, Any]], None]


class Telemetry:
    """Records of a run; only process 0 writes. A context manager, which closes the files.

    A record is ``{"step", "phase", "phase_step", <metric>: value or list, "seconds_per_step",
    "examples_per_second", "tokens_per_second", "goodput", "wall_seconds"}``:

    * seconds per step leave out compilation, checkpoints and evaluation; the rates follow from them,
    * tokens are the non-zero entries of batch fields called ``*tokens`` (``decoder_input_tokens``, the shifted
      copy of the targets, is left out), over all processes,
    * goodput is the share of wall seconds since this start that went into steps; ``logs/goodput.json`` tells what
      the rest was lost to, over this start and over all on this MODEL_DIR (see ``goodput.Spent``).

    Attributes:
      goodput: the clock of this start.
      step: of the run, begun last.
    """

    def __init__(self, directory: str | Path, progress: Progress | None = None, started: float | None = None):
        """Opens nothing yet: ``resume`` does, when the first step is known.

        Args:
          directory: ``MODEL_DIR/logs``.
          progress: called with each record, for a progress bar.
          started: see ``goodput.Goodput``.
        """
        self._directory = Path(directory)
        self._progress = progress
        self._file = self._events = None
        self._latest: dict[str, Any] = {}
        self.goodput = Goodput(started=started)
        self.step = 0
        self._window, self._window_stopped = self.goodput.clock(), 0.0
        self._steps = self._examples = self._tokens = 0

    def resume(self, step: int) -> None:
        """Opens the files; what an earlier run recorded beyond ``step`` is dropped: it will come again."""
        if jax.process_index() == 0:
            with self._explained():
                self._open(step)
        self._window, self._window_stopped = self.goodput.clock(), self.goodput.stopped_seconds
        self.step = step

    def _open(self, step: int) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / "metrics.jsonl"
        found = read_lines(path)
        self.goodput.resume(self._directory, repeated_seconds(found, step))
        with whole(path) as file:
            file.writelines(json.dumps(record) + "\n" for record in found if record["step"] <= step)
        self._events = Events(self._directory, step)
        self._file = path.open("a")

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self._file is None:
            return
        logging.info("%s", self.goodput.summary())
        for write in (lambda: self.goodput.save(self._directory), self._events.close, self._file.close):
            try:
                with self._explained():
                    write()
            except Exception as error:
                if kind is None:
                    raise
                logging.error("%s", error)  # beside the error that ended the run, which is the one to be seen

    def _explained(self) -> AbstractContextManager[None]:
        what = f"the log could not be written to {self._directory}; checkpoints are whole"
        return disk.explained(what, lambda: "goes on from the newest of them")

    def lost(
        self, cause: str, unless: Callable[[], bool] = lambda: False, doing: str | None = None
    ) -> AbstractContextManager[None]:
        """See ``goodput.Goodput.lost``; the causes are ``goodput.Spent``'s."""
        return self.goodput.lost(cause, unless, doing)

    def count(self, batch: Any) -> None:
        """Counts one step on this process's rows."""
        self.goodput.step()
        self.step += 1
        self._steps += 1
        self._examples += jax.process_count() * jax.tree.leaves(batch)[0].shape[0]
        self._tokens += jax.process_count() * token_count(batch)

    def log(
        self, step: int, phase: str, phase_step: int, metrics: Iterable[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Writes and returns the record of the steps since the last one.

        Args:
          metrics: of each of these steps, name -> (total, count) on the host.
        """
        now, stopped = self.goodput.clock(), self.goodput.stopped_seconds
        spent = self.goodput.spent
        seconds = max(1e-9, now - self._window - (stopped - self._window_stopped))
        record = {"step": step, "phase": phase, "phase_step": phase_step} | mean_metrics(metrics)
        record |= {
            "seconds_per_step": seconds / max(1, self._steps),
            "examples_per_second": self._examples / seconds,
            "tokens_per_second": self._tokens / seconds,
            "goodput": spent.share,
            "wall_seconds": spent.wall_seconds,
        }
        self._window, self._window_stopped = now, stopped
        self._steps = self._examples = self._tokens = 0
        self.write(record)
        if self._file is not None:
            with self._explained():
                self.goodput.save(self._directory)
        return record

    def logged(self, step: int) -> Mapping[str, Any]:
        """What was written at this step, the same in every process but for the timings; empty where nothing was."""
        return self._latest if self._latest.get("step") == step else {}

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes a record that has ``step`` and any numbers, lists of numbers and strings.

        Raises:
          UserError: the disk is full.
        """
        if record["step"] != self._latest.get("step"):
            self._latest = {}
        self._latest |= record
        if self._file is None:
            return
        with self._explained():
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
            for name, value in record.items():
                if isinstance(value, (list, int, float)) and name != "step":
                    self._events.write(name, value, record["step"])
        numbers = [f"{k} {v:.5g}" for k, v in record.items() if isinstance(v, float)]
        logging.info("step %d: %s", record["step"], ", ".join(numbers))
        if self._progress is not None:
            self._progress(record)


def mean_metrics(metrics: Iterable[Mapping[str, tuple[Any, Any]]]) -> dict[str, Any]:
    """sum(total) / sum(count) over steps, per name: a float, or a list; absent where the count is 0."""
    sums: dict[str, tuple[Any, Any]] = {}
    for step in metrics:
        for name, (total, count) in step.items():
            old = sums.get(name, (0.0, 0.0))
            sums[name] = (old[0] + np.asarray(total, np.float64), old[1] + np.asarray(count, np.float64))
    values = {name: total / count for name, (total, count) in sums.items() if np.all(count != 0)}
    return {name: value.tolist() for name, value in values.items() if np.all(np.isfinite(value))}


def token_count(batch: Any) -> int:
    """Non-padding tokens of a batch: see ``Telemetry``."""
    total = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(batch)[0]:
        name = path_name(path).rsplit("/", 1)[-1]
        if name.endswith("tokens") and name != "decoder_input_tokens":
            total += int(np.count_nonzero(leaf))
    return total
