"""What answering costs: encoder tokens, seconds, and the most that skipping retrieval can save.

Tokens are counted where retrieval spends them: in the encoder, which reads the question once and, for a
question that retrieves, K passages. *Real* tokens are not padding; *padded* tokens are what the hardware
multiplies.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def encoder_tokens(question_tokens: Any, passage_tokens: Any, retrieve: Any) -> np.ndarray:
    """Real encoder tokens per question.

    Args:
      question_tokens: [N, L] int32, 0-padded.
      passage_tokens: [N, K, P] int32, 0-padded.
      retrieve: [N] bool.

    Returns:
      [N] int64.
    """
    question = np.count_nonzero(np.asarray(question_tokens), axis=1)
    evidence = np.count_nonzero(np.asarray(passage_tokens), axis=(1, 2))
    return question + np.where(np.asarray(retrieve, bool), evidence, 0)


def padded_encoder_tokens(
    retrieve: Any, batch_size: int, question_length: int, evidence_length: int, buckets: Sequence[int]
) -> float:
    """Encoder tokens per question, padding included, when batches are split and the retrieving rows fill a
    bucket.

    Every batch runs ``batch_size`` questions of ``question_length``; its r > 0 retrieving rows are padded to
    the smallest bucket that holds them, and each row of the bucket reads ``evidence_length`` = K P tokens.

    Args:
      retrieve: [N] bool, in the order of answering.
      batch_size: rows per batch; the last batch is padded to it.
      question_length: L.
      evidence_length: K P.
      buckets: numbers of rows that programs exist for; the largest must hold a whole batch.

    Raises:
      ValueError: no questions, or buckets that do not hold a batch.
    """
    retrieve = np.asarray(retrieve, bool)
    if not len(retrieve):
        raise ValueError("there are no questions to count tokens for")
    if max(buckets) < batch_size:
        raise ValueError(f"the largest bucket, {max(buckets)}, does not hold a batch of {batch_size}")
    batches = np.array(
        [retrieve[low : low + batch_size].sum() for low in range(0, len(retrieve), batch_size)]
    )
    sizes = np.sort(np.asarray(buckets))
    rows = np.where(batches > 0, sizes[np.searchsorted(sizes, batches)], 0)
    total = len(batches) * batch_size * question_length + rows.sum() * evidence_length
    return float(total / len(retrieve))


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
