"""Is a probability to be believed: reliability bins and the expected calibration error."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class ReliabilityBins:
    """Predictions grouped by their probability; M bins, of which empty ones are left out.

    Attributes:
      probability: [M] mean predicted probability.
      frequency: [M] fraction of positives.
      count: [M] number of predictions.
    """

    probability: np.ndarray
    frequency: np.ndarray
    count: np.ndarray


def reliability_bins(probabilities: Any, labels: Any, bins: int = 15) -> ReliabilityBins:
    """Bins of equal width over [0, 1]; an edge belongs to the bin on its right, 1 to the last bin.

    Args:
      probabilities: [N] in [0, 1].
      labels: [N] bool or 0/1; NaN (unknown) is ignored.
      bins: number of bins.

    Raises:
      ValueError: no known label, or shapes that differ.
    """
    probabilities, labels = np.asarray(probabilities, np.float64), np.asarray(labels, np.float64)
    if probabilities.shape != labels.shape:
        raise ValueError(f"{probabilities.shape} probabilities but {labels.shape} labels")
    known = ~np.isnan(labels)
    if not known.any():
        raise ValueError("reliability needs at least one known label")
    probabilities, labels = probabilities[known], labels[known]
    index = np.minimum((probabilities * bins).astype(int), bins - 1)
    count = np.bincount(index, minlength=bins)
    full = count > 0
    mean = np.bincount(index, probabilities, bins)[full] / count[full]
    frequency = np.bincount(index, labels, bins)[full] / count[full]
    return ReliabilityBins(mean, frequency, count[full])


def expected_calibration_error(probabilities: Any, labels: Any, bins: int = 15) -> float:
    """ECE = sum_m n_m/N |frequency_m - probability_m| (Naeini et al. 2015; Guo et al. 2017), in [0, 1].

    Args and raises as for `reliability_bins`.
    """
    groups = reliability_bins(probabilities, labels, bins)
    return float(np.abs(groups.frequency - groups.probability) @ groups.count / groups.count.sum())
