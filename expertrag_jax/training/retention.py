"""Which checkpoints stay: the newest, one every so many steps, the best by a metric."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from orbax.checkpoint import v1 as ocp

from expertrag_jax.ranges import Count, Natural, checked

_LOG = logging.getLogger(__name__)


@checked
@dataclasses.dataclass(frozen=True)
class Retention:
    """A checkpoint stays if one of the three rules keeps it; the others are deleted after the next one is written.

    Attributes:
      latest: the newest so many; 0: all. A run goes on from the newest.
      every_steps: those whose step is a multiple of this, for ever; None: no such rule.
      best: so many of each phase, by ``metric``.
      metric: a name in the log, such as ``"eval/loss"``. A checkpoint is compared by what was measured at its own
        step; one at whose step nothing was measured is never among the best, so let the period of checkpoints be a
        multiple of the evaluation's.
      larger_is_better: whether the best have the largest values.
      phases: regular expression: the phases of such names are compared with one another, as the iterations of one
        training are, and no others; None: every phase by itself.
    """

    latest: Natural = 3
    every_steps: Count | None = None
    best: Natural = 0
    metric: str = "eval/loss"
    larger_is_better: bool = False
    phases: str | None = None

    def policy(self, held: Held | None = None) -> ocp.training.preservation_policies.PreservationPolicy | None:
        """Orbax's policy, which also keeps what is ``held``; None keeps all."""
        policies = ocp.training.preservation_policies
        if not self.latest:
            return None
        kept = [policies.LatestN(self.latest), _Best(self), held or Held()]
        if self.every_steps:
            kept.append(policies.EveryNSteps(self.every_steps))
        return policies.AnyPreservationPolicy(kept)

    def measured(self, step: int, phase: str, metrics: Mapping[str, Any]) -> dict[str, Any] | None:
        """What is stored beside a checkpoint for the comparison; None, with a warning, where there is no number.

        Args:
          step, phase: of the checkpoint.
          metrics: what was logged at this step, by name.
        """
        if not self.best or not (self.phases is None or re.fullmatch(self.phases, phase)):
            return None
        value = metrics.get(self.metric)
        if isinstance(value, (int, float)) and math.isfinite(value):
            return {"phase": self.phases or phase, "value": float(value)}
        _LOG.warning(
            "the checkpoint at step %d is not compared by %s, which has no finite value at this step (there are: %s)",
            step, self.metric, ", ".join(sorted(metrics)) or "none",
        )  # fmt: skip
        return None


@dataclasses.dataclass
class Held:
    """Orbax's policy for one checkpoint that a run may return to; ``step`` None: there is none."""

    step: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """One answer per checkpoint."""
        del context
        return [checkpoint.step == self.step for checkpoint in checkpoints]


@dataclasses.dataclass(frozen=True)
class _Best:
    """Orbax's ``BestN``, for each phase, or group of phases, by itself: losses of others have nothing in common."""

    retention: Retention

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """One answer per checkpoint; of equal ones the oldest stays, as ``early_stopping`` sees it."""
        del context
        phases: dict[str, list[Any]] = {}
        for checkpoint in checkpoints:
            if checkpoint.metrics:
                phases.setdefault(checkpoint.metrics["phase"], []).append(checkpoint)
        sign = 1 if self.retention.larger_is_better else -1
        best = set()
        for members in phases.values():
            members.sort(key=lambda member: (sign * member.metrics["value"], -member.step))
            best.update(member.step for member in members[max(0, len(members) - self.retention.best) :])
        return [checkpoint.step in best for checkpoint in checkpoints]
