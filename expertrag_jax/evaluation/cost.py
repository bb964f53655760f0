"""What answering costs in seconds, and the most that skipping retrieval can save."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def avoidable_share(seconds_never: float, seconds_always: float) -> float:
    """f: the fraction of always-retrieve's time that never retrieving saves, 1 - never/always, at least 0."""
    return max(0.0, 1.0 - seconds_never / seconds_always)


def speed_up_bound(retrieval_rate: float, avoidable: float) -> float:
    """1 / (1 - (1-r) f): the speed-up over always-retrieve if skipping saved all that it could, for free.

    Args:
      retrieval_rate: r, the fraction of questions that retrieve.
      avoidable: f, see `avoidable_share`.

    The argument is Amdahl's (1967): of each skipped question's time, only the share f goes away.
    """
    return 1.0 / (1.0 - (1.0 - retrieval_rate) * avoidable)


@dataclasses.dataclass(frozen=True)
class SpeedUp:
    """How much faster the gate answers than always-retrieve, from interleaved timings.

    Attributes:
      speed_up: always's median seconds over the gate's.
      avoidable_share: f, from the medians of never and always.
      bound: 1 / (1 - (1-r) f).
      fraction_of_bound: speed_up / bound.
      rounds: the smallest and largest ratio of always's to the gate's seconds in one round.
      seconds: policy -> the timings that the medians were taken of, in the order in which they ran.
    """

    speed_up: float
    avoidable_share: float
    bound: float
    fraction_of_bound: float
    rounds: tuple[float, float]
    seconds: dict[str, list[float]]


def summarise_speed_up(
    seconds: Mapping[str, Sequence[float]], retrieval_rate: float, policy: str = "gate"
) -> SpeedUp:
    """Medians of timings that were taken in turn (never, always, gate, never, ...) on the same questions.

    Taking turns lets a slow minute of the machine fall on every policy; the median drops it.

    Args:
      seconds: timings of "never", "always" and ``policy``, equally many of each.
      retrieval_rate: of ``policy`` on these questions.
      policy: the one to judge.

    Raises:
      ValueError: a policy without timings, or unequal numbers of them.
    """
    names = ("never", "always", policy)
    counts = [len(seconds.get(name, ())) for name in names]
    if not all(counts) or len(set(counts)) != 1:
        raise ValueError(
            f"timings of {', '.join(names)} must be equally many and at least one, they are {counts}"
        )
    median = {name: float(np.median(seconds[name])) for name in names}
    avoidable = avoidable_share(median["never"], median["always"])
    bound = speed_up_bound(retrieval_rate, avoidable)
    speed_up = median["always"] / median[policy]
    timings = {name: [float(second) for second in values] for name, values in seconds.items()}
    ratios = np.divide(timings["always"], timings[policy])
    rounds = float(ratios.min()), float(ratios.max())
    return SpeedUp(speed_up, avoidable, bound, speed_up / bound, rounds, timings)


def latency_percentiles(seconds: Any) -> tuple[float, float]:
    """(p50, p95) in milliseconds of the seconds [N] that single questions took."""
    p50, p95 = np.percentile(np.asarray(seconds, np.float64) * 1000, [50, 95])
    return float(p50), float(p95)
