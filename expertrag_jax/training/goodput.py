"""Goodput: the share of wall time that went into steps, and what the rest was lost to."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from expertrag_jax.files.writing import whole

FILE = "goodput.json"

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Spent:
    """Wall time and what was lost of it.

    Attributes:
      wall_seconds: from the start of the command's process (or of ``loop.train``, called from Python) to the end of
        training, or to the last log line of a run that was killed.
      lost_seconds: by cause: ``startup`` (packages, configuration and data sets loaded, processes joined, state made or
        restored), ``compile``, ``checkpoint``, ``evaluation``;
        ``data``: the loop waited for a batch, or prepared one, and the device had nothing left to do when it came (an
        upper bound of the device's idle time); ``repeated``: steps logged by an earlier start, beyond the checkpoint
        that the next one resumed from.
      starts: how often the run was started.
    """

    wall_seconds: float = 0.0
    lost_seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    starts: int = 0

    @property
    def share(self) -> float:
        """Of the wall time in steps, 0 to 1."""
        return max(0.0, 1 - sum(self.lost_seconds.values()) / max(1e-9, self.wall_seconds))

    def __add__(self, other: Spent) -> Spent:
        lost = collections.Counter(self.lost_seconds)
        lost.update(other.lost_seconds)
        return Spent(self.wall_seconds + other.wall_seconds, dict(lost), self.starts + other.starts)

    def __str__(self) -> str:
        lost = [f"{cause} {seconds:.1f} s" for cause, seconds in self.lost_seconds.items() if seconds >= 0.05]
        told = f"wall time {self.wall_seconds:.1f} s, {self.share:.1%} of it in steps"
        return told + (f"; lost: {', '.join(lost)}" if lost else "")


class Goodput:
    """The clock of one start of a run.

    Attributes:
      doing: what goes on now, and since when: ``("step", monotonic seconds)`` or a cause of loss.
      earlier: what earlier starts on the same MODEL_DIR spent.
    """

    def __init__(self, clock: Callable[[], float] | None = None, started: float | None = None):
        """Args: started: by the clock, when the run's process was; all until now is ``startup``. None: now."""
        self.clock = clock or time.monotonic
        self.earlier = Spent()
        now = self.clock()
        self._start = now if started is None else started
        self._lost: collections.Counter[str] = collections.Counter()
        if self._start < now:
            self._lost["startup"] = now - self._start
        self.doing = ("startup", now)

    @contextlib.contextmanager
    def lost(
        self, cause: str, unless: Callable[[], bool] = lambda: False, doing: str | None = None
    ) -> Iterator[None]:
        """Counts the seconds inside as lost to a cause, unless ``unless()`` holds at their end.

        ``doing``: what goes on, where the cause alone does not tell it.
        """
        start = self.clock()
        self.doing = (doing or cause, start)
        try:
            yield
        finally:
            end = self.clock()
            self.doing = ("step", end)
            if not unless():
                self._lost[cause] += end - start

    def step(self) -> None:
        """Notes that a step was taken."""
        self.doing = ("step", self.clock())

    @property
    def stopped_seconds(self) -> float:
        """Seconds so far in which training stood still by intent; a wait for data is part of a step's time."""
        return sum(seconds for cause, seconds in self._lost.items() if cause != "data")

    @property
    def spent(self) -> Spent:
        """Since this start."""
        return Spent(self.clock() - self._start, dict(self._lost), 1)

    def summary(self) -> str:
        """One line: this start and, where there were others, all of them."""
        return _summary(self.spent, self.earlier + self.spent)

    def resume(self, directory: Path, repeated_seconds: float) -> None:
        """Takes over what earlier starts wrote, ``repeated_seconds`` of it in vain; nothing from a damaged file."""
        path = directory / FILE
        if not path.is_file():
            return
        lost = {"repeated": repeated_seconds} if repeated_seconds else {}
        try:
            self.earlier = Spent(**json.loads(path.read_text())["total"]) + Spent(lost_seconds=lost)
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:  # a log is no reason not to train
            _LOG.warning("%s is damaged (%s): what earlier starts spent is not counted", path, error)

    def save(self, directory: Path) -> None:
        """Writes ``goodput.json`` with this start and all of them; it appears whole."""
        this = self.spent
        text = json.dumps({"this_start": _rounded(this), "total": _rounded(self.earlier + this)}, indent=1)
        try:
            with whole(directory / FILE) as file:
                file.write(text + "\n")
        except (FileNotFoundError, PermissionError) as error:  # a link to where nothing can be written
            _LOG.warning("%s cannot be written (%s): what this start spent is not counted", directory / FILE, error)


def last_saved(directory: Path) -> int | None:
    """When the file in ``MODEL_DIR/logs`` was written, in nanoseconds; None: never, or it is a device."""
    path = directory / FILE
    return path.stat().st_mtime_ns if path.is_file() and path.stat().st_size else None


def read_summary(directory: Path) -> str:
    """``Goodput.summary`` as last saved in ``MODEL_DIR/logs``."""
    stored = json.loads((directory / FILE).read_text())
    return _summary(Spent(**stored["this_start"]), Spent(**stored["total"]))


def _summary(this: Spent, total: Spent) -> str:
    return str(this) if total.starts == this.starts else f"{this}; over all {total.starts} starts: {total}"


def _rounded(spent: Spent) -> dict[str, Any]:
    lost = {cause: round(seconds, 3) for cause, seconds in spent.lost_seconds.items()}
    return {"wall_seconds": round(spent.wall_seconds, 3), "lost_seconds": lost, "starts": spent.starts}


def repeated_seconds(records: list[Mapping[str, Any]], step: int) -> float:
    """Seconds in steps after ``step`` that a run's log records tell of: they will be taken once more."""
    total, previous = 0.0, 0
    for record in records:
        if "seconds_per_step" in record:
            total += max(0, record["step"] - max(previous, step)) * record["seconds_per_step"]
            previous = record["step"]
    return total
