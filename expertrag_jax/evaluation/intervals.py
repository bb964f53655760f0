"""Bootstrap intervals that resample facts, not questions.

Questions about one fact rise and fall together, so resampling questions would make intervals too narrow:
whole clusters (facts) are drawn with replacement (Efron & Tibshirani 1993, chapter 8), and percentiles of the
statistic are read off.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

REPLICATES = 1000
LEVEL = 0.95


def weighted_mean(values: Any, weights: Any = None) -> float:
    """sum(w v) / sum(w); plain mean without weights.

    Args:
      values: [N], a score per question.
      weights: [N] non-negative, for instance how often a question is asked under Zipf's law.

    Raises:
      ValueError: nothing to average, or weights that sum to 0.
    """
    values = np.asarray(values, np.float64)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, np.float64)
    if not len(values) or weights.sum() <= 0:
        raise ValueError("a mean needs at least one value with a positive weight")
    return float(weights @ values / weights.sum())


def mean_interval(
    values: Any,
    clusters: Any,
    weights: Any = None,
    replicates: int = REPLICATES,
    seed: int = 0,
    level: float = LEVEL,
) -> tuple[float, float]:
    """Cluster bootstrap percentile interval of the (weighted) mean.

    Args:
      values: [N] a score per question; for a paired comparison, the difference of two policies' scores.
      clusters: [N] ids of the facts asked about.
      weights: [N] or None.
      replicates: bootstrap samples.
      seed: of the resampling.
      level: coverage.

    Returns:
      (low, high).
    """
    values = np.asarray(values, np.float64)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, np.float64)
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    total, size = np.bincount(index, weights * values), np.bincount(index, weights)
    rng = np.random.default_rng(seed)
    means = np.empty(replicates)
    for replicate in range(replicates):
        drawn = rng.integers(len(total), size=len(total))
        means[replicate] = total[drawn].sum() / max(size[drawn].sum(), np.finfo(float).tiny)
    return _percentiles(means, level)


def statistic_interval(
    statistic: Callable[[np.ndarray], float],
    clusters: Any,
    replicates: int = REPLICATES,
    seed: int = 0,
    level: float = LEVEL,
) -> tuple[float, float]:
    """Cluster bootstrap percentile interval of any statistic, such as an AUROC.

    Args:
      statistic: of the row numbers [M] of a resampled data set; NaN where it is undefined (ignored).
      clusters, replicates, seed, level: as for `mean_interval`.

    Returns:
      (low, high); NaN if the statistic was never defined.
    """
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    rows = np.argsort(index, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(index))])
    members = [rows[low:high] for low, high in zip(starts[:-1], starts[1:], strict=True)]
    rng = np.random.default_rng(seed)
    values = np.empty(replicates)
    for replicate in range(replicates):
        drawn = rng.integers(len(members), size=len(members))
        values[replicate] = statistic(np.concatenate([members[cluster] for cluster in drawn]))
    values = values[~np.isnan(values)]
    return _percentiles(values, level) if len(values) else (float("nan"), float("nan"))


def _percentiles(values: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
