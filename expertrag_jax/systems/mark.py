"""The mark at which a phase of training has done its work."""

from __future__ import annotations

import dataclasses

from expertrag_jax.errors import UserError
from expertrag_jax.ranges import Count, Natural, Number, checked

IF_MISSED = ("continue", "stop", "retry")


@checked
@dataclasses.dataclass(frozen=True)
class Reached:
    """The mark at which a phase has done its work.

    The metric is averaged over the phase's last ``over`` steps, as a log record is (sum of totals over sum of
    counts), and compared whenever a record is logged. The phase's own ``steps`` stay the upper bound.

    Attributes:
      metric: name of a scalar metric of the phase's loss, for example ``"sequence_accuracy"``.
      value: the mark; reached at this value or above, or below if ``larger_is_better`` is False.
      over: number of steps in the average.
      at_least: steps that the phase takes in any case.
      larger_is_better: False for losses.
      if_missed: what to do when ``steps`` are over and the mark is not reached: ``"continue"`` with the next
        phase, ``"stop"`` the run, or ``"retry"`` the phase from its first checkpoint with the data and the random
        numbers that come next. When all retries are used up, ``"retry"`` continues.
      retries: largest number of retries.

    >>> Reached("sequence_accuracy", 0.95, over=40, if_missed="retry", retries=1).met(0.97)
    True
    """

    metric: str
    value: Number
    over: Count = 40
    at_least: Natural = 0
    larger_is_better: bool = True
    if_missed: str = "continue"
    retries: Natural = 1

    def __post_init__(self):
        if self.if_missed not in IF_MISSED:
            raise UserError(f"Reached.if_missed is {self.if_missed!r}; it must be one of {', '.join(IF_MISSED)}.")

    def met(self, value: float) -> bool:
        """Whether a value of the metric reaches the mark."""
        return value >= self.value if self.larger_is_better else value <= self.value
