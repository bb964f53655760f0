"""Follows a phase towards its mark (``systems.mark.Reached``), and remembers how phases ended."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from expertrag_jax.errors import UserError
from expertrag_jax.systems.mark import Reached


class Missed(UserError):
    """A phase took all of its steps without reaching its mark, and its ``Reached`` stops the run."""


class Mastery:
    """How far the current phase is from its mark, and how earlier phases ended.

    Its JSON goes into every checkpoint, so that a run that was killed makes the same decisions when it is resumed.

    Attributes:
      ended: one record per phase that ended, by mark or by steps, and has a mark: ``{"phase", "metric", "mark",
        "value", "steps", "attempts", "reached"}``.
      attempt: number of retries of the current phase so far.
      start: step of the checkpoint from which the current phase can be retried; None outside such a phase.
    """

    def __init__(self, stored: Mapping[str, Any] | None = None):
        stored = stored or {}
        self.ended: list[dict[str, Any]] = list(stored.get("ended", []))
        self.attempt: int = stored.get("attempt", 0)
        self.start: int | None = stored.get("start")
        self._window: deque[tuple[float, float]] = deque(map(tuple, stored.get("window", [])))

    def finished(self, phase: str) -> bool:
        """Whether a phase with a mark has ended."""
        return any(record["phase"] == phase for record in self.ended)

    def add(self, mark: Reached | None, metrics: Iterable[Mapping[str, tuple[Any, Any]]]) -> None:
        """Takes the metrics of consecutive steps, name -> (total, count), on the host.

        Raises:
          UserError: the phase's loss has no such scalar metric.
        """
        if mark is not None:
            self._window.extend(_pairs(mark, metrics))
            while len(self._window) > mark.over:
                self._window.popleft()

    def value(self, mark: Reached) -> float | None:
        """The average over the last ``over`` steps; None while there are fewer, or nothing was counted."""
        if len(self._window) < mark.over:
            return None
        total, count = np.sum(np.array(self._window, np.float64), axis=0)
        return float(total / count) if count else None

    def reached(self, mark: Reached | None, phase_step: int) -> bool:
        """Whether the phase may end now."""
        if mark is None or phase_step < mark.at_least:
            return False
        value = self.value(mark)
        return value is not None and bool(mark.met(value))

    def retries(self, mark: Reached | None, phase_step: int) -> bool:
        """Whether a phase that is over is to be tried again."""
        again = mark is not None and mark.if_missed == "retry" and self.attempt < mark.retries
        return again and not self.reached(mark, phase_step)

    def judge(self, phase: str, mark: Reached, phase_step: int) -> dict[str, Any]:
        """The record of the attempt that is over; see ``ended``."""
        return {
            "phase": phase, "metric": mark.metric, "mark": float(mark.value), "value": self.value(mark),
            "steps": phase_step, "attempts": self.attempt + 1, "reached": self.reached(mark, phase_step),
        }  # fmt: skip

    def end(self, phase: str, mark: Reached, phase_step: int) -> dict[str, Any]:
        """Records that the phase is over, and returns the record."""
        record = self.judge(phase, mark, phase_step)
        self.ended.append(record)
        self.leave()
        return record

    def leave(self) -> None:
        """Forgets the current phase."""
        self.attempt, self.start = 0, None
        self._window.clear()

    def retry(self, phase: str, mark: Reached, phase_step: int) -> dict[str, Any]:
        """Begins the next attempt at the phase, and returns the record of the one that is over."""
        record = self.judge(phase, mark, phase_step)
        self.attempt += 1
        self._window.clear()
        return record

    def as_json(self, mark: Reached | None, pending: Iterable[Mapping[str, tuple[Any, Any]]] = ()) -> dict[str, Any]:
        """JSON-ready state.

        Args:
          pending: metrics of steps that were taken but not yet logged.
        """
        window = list(self._window) + ([] if mark is None else _pairs(mark, pending))
        over = 0 if mark is None else mark.over
        stored = {"ended": list(self.ended), "attempt": self.attempt, "start": self.start}
        return stored | {"window": [list(pair) for pair in window[max(0, len(window) - over) :]]}


def summary(record: Mapping[str, Any]) -> str:
    """One sentence about a phase that ended: its mark, what it reached, and after how many steps."""
    measured = "is not measured yet" if record["value"] is None else f"is {record['value']:.4g}"
    retried = f" at attempt {record['attempts']:.0f}" if record["attempts"] > 1 else ""
    verb = "reached" if record["reached"] else "did not reach"
    return (
        f"Phase '{record['phase']}' {verb} its mark{retried}: {record['metric']} {measured} after "
        f"{record['steps']:.0f} steps, the mark is {record['mark']:.4g}."
    )


def _pairs(mark: Reached, metrics: Iterable[Mapping[str, tuple[Any, Any]]]) -> list[tuple[float, float]]:
    pairs = []
    for step in metrics:
        if mark.metric not in step or np.ndim(step[mark.metric][0]):
            known = ", ".join(sorted(name for name, (total, _) in step.items() if not np.ndim(total)))
            raise UserError(
                f"Reached names the metric {mark.metric!r}, which this phase does not log; it logs {known}."
            )
        total, count = step[mark.metric]
        pairs.append((float(total), float(count)))
    return pairs
