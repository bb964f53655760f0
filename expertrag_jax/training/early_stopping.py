"""A run ends before its last step where validation no longer improves."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Mapping
from typing import Any

from expertrag_jax.errors import UserError
from expertrag_jax.ranges import Count, Weight, checked

_LOG = logging.getLogger(__name__)


@checked
@dataclasses.dataclass(frozen=True)
class EarlyStopping:
    """When to stop. The best checkpoint stays where ``retention.Retention`` keeps the best by the same metric; whoever
    then opens the MODEL_DIR gets that one (``pretrained.read_whole``). Training itself goes on from the newest.

    Attributes:
      metric: a name in the log, such as ``"eval/loss"``.
      patience: so many measurements in a row that are no better than the best one before them end the run.
      phases: regular expression; measurements in other phases do not count. When the run ends, the phases that match
        are skipped, and those that do not match still run.
      larger_is_better: whether the best have the largest values.
      min_improvement: what counts as better, in units of the metric.
    """

    metric: str = "eval/loss"
    patience: Count = 2
    phases: str = ".*"
    larger_is_better: bool = False
    min_improvement: Weight = 0.0

    def __post_init__(self):
        try:
            re.compile(self.phases)
        except re.error as error:
            raise UserError(f"EarlyStopping.phases {self.phases!r} is not a regular expression: {error}.") from error


class Patience:
    """What has been measured so far; its JSON goes with every checkpoint, so that a resumed run stops alike.

    Args:
      rule: None: never stops. stored: an earlier run's ``as_json()``.
    """

    def __init__(self, rule: EarlyStopping | None, stored: Mapping[str, Any] | None = None):
        self._rule = rule
        stored = stored or {}
        self.best: float | None = stored.get("best")
        self.best_step: int | None = stored.get("best_step")
        self.measured: list[str] = list(stored.get("measured", []))  # phases, the best one's last
        self.in_vain: int = stored.get("in_vain", 0)

    @property
    def exhausted(self) -> bool:
        """Whether the run is to end."""
        return self._rule is not None and self.in_vain >= self._rule.patience

    def add(self, step: int, phase: str, figures: Mapping[str, float]) -> None:
        """Takes note of what was measured at a step; the rule's metric may be missing."""
        rule = self._rule
        if not self.covers(phase) or rule.metric not in figures:
            return
        value = float(figures[rule.metric])
        gain = math.inf if self.best is None else (value - self.best) * (1 if rule.larger_is_better else -1)
        if math.isfinite(value) and gain > rule.min_improvement:
            self.best, self.best_step, self.in_vain = value, step, 0
            self.measured = [name for name in self.measured if name != phase] + [phase]
            return
        self.measured = [phase] * (phase not in self.measured) + self.measured
        self.in_vain += 1
        if self.exhausted:
            _LOG.warning(
                "stopping early at step %d: %s was best at step %s (%.6g) and no better in the %d measurements since",
                step, rule.metric, self.best_step, self.best if self.best is not None else math.nan, self.in_vain,
            )  # fmt: skip

    def covers(self, phase: str) -> bool:
        """Whether the rule is about a phase."""
        return self._rule is not None and re.fullmatch(self._rule.phases, phase) is not None

    def best_for(self, phase: str) -> int | None:
        """The step whose parameters are best for whoever opens a checkpoint of this phase; None: nobody can tell.

        It is a step of another phase only where the rule names the phases that it compares and this one was measured.
        """
        comparable = self.covers(phase) and phase in self.measured
        same = comparable and (phase == self.measured[-1] or self._rule.phases != EarlyStopping.phases)
        return self.best_step if same else None

    def skips(self, phase: str) -> bool:
        """Whether a phase is left out, or left."""
        return self.exhausted and self.covers(phase)

    def as_json(self) -> dict[str, Any]:
        """JSON-ready state."""
        found = {"best": self.best, "best_step": self.best_step, "in_vain": self.in_vain}
        return found | {"measured": list(self.measured)}
