"""Does the gate choose well: how it ranks questions, and what its ranking buys.

Per question, both arms tell what retrieving was worth: *needed* is wrong without and right with evidence,
*harmful* the reverse. N questions; scores are any numbers that grow with the wish to retrieve, such as p_ret.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


def retrieval_needed(correct_without: Any, correct_with: Any) -> np.ndarray:
    """[N] bool: never retrieving is wrong and always retrieving is right."""
    return ~np.asarray(correct_without, bool) & np.asarray(correct_with, bool)


def retrieval_harmful(correct_without: Any, correct_with: Any) -> np.ndarray:
    """[N] bool: never retrieving is right and always retrieving is wrong."""
    return np.asarray(correct_without, bool) & ~np.asarray(correct_with, bool)


def auroc(scores: Any, labels: Any) -> float:
    """Area under the ROC curve: the chance that a positive outscores a negative, ties counting one half.

    Args:
      scores: [N].
      labels: [N] bool.

    Returns:
      a fraction; NaN when one class is empty.
    """
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels, bool)
    positives, negatives = labels.sum(), (~labels).sum()
    if not positives or not negatives:
        return float("nan")
    # Mann-Whitney: the ranks of the positives, each tie group sharing its mean rank.
    _, group, size = np.unique(scores, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(size) - (size - 1) / 2
    return float((mean_rank[group][labels].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def average_precision(scores: Any, labels: Any) -> float:
    """sum_n (R_n - R_{n-1}) P_n over the distinct scores, highest first: questions that tie enter together.

    Args:
      scores: [N].
      labels: [N] bool.

    Returns:
      a fraction; NaN without positives.
    """
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels, bool)
    if not labels.any():
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    ends = _tie_ends(scores[order])
    hits = np.cumsum(labels[order])[ends]
    recall = hits / labels.sum()
    return float(np.diff(recall, prepend=0.0) @ (hits / (ends + 1)))


@dataclasses.dataclass(frozen=True)
class Curve:
    """Accuracy over retrieval rate, straight between the points.

    Attributes:
      rate: [M] ascending from 0 to 1.
      accuracy: [M].
    """

    rate: np.ndarray
    accuracy: np.ndarray

    @property
    def area(self) -> float:
        """Area under the curve, the mean accuracy over all rates."""
        return float(np.sum(np.diff(self.rate) * (self.accuracy[1:] + self.accuracy[:-1]) / 2))

    def thinned(self, points: int = 201) -> Curve:
        """The curve read at ``points`` evenly spaced rates: enough to draw it."""
        rate = np.linspace(0, 1, points)
        return Curve(rate, np.interp(rate, self.rate, self.accuracy))


def accuracy_curve(scores: Any, correct_without: Any, correct_with: Any) -> Curve:
    """Accuracy when the highest-scoring fraction of the questions retrieves.

    Questions with equal scores enter together; the straight line between is what breaking the tie at random
    gives on average. So a constant score is the random policy.

    Args:
      scores: [N].
      correct_without, correct_with: [N] bool or scores in [0, 1].

    Raises:
      ValueError: no questions.
    """
    scores = np.asarray(scores, np.float64)
    without, with_ = np.asarray(correct_without, np.float64), np.asarray(correct_with, np.float64)
    if not len(scores):
        raise ValueError("a curve needs at least one question")
    order = np.argsort(-scores, kind="stable")
    ends = _tie_ends(scores[order])
    gained = np.cumsum((with_ - without)[order])[ends]
    accuracy = (without.sum() + np.concatenate([[0.0], gained])) / len(scores)
    return Curve(np.concatenate([[0.0], (ends + 1) / len(scores)]), accuracy)


def oracle_curve(correct_without: Any, correct_with: Any) -> Curve:
    """The best possible curve: questions that need retrieval first, those that it harms last."""
    gain = np.asarray(correct_with, np.float64) - np.asarray(correct_without, np.float64)
    return accuracy_curve(gain, correct_without, correct_with)


def random_curve(correct_without: Any, correct_with: Any) -> Curve:
    """The straight line from never to always: what choosing questions blindly gives on average."""
    return accuracy_curve(np.zeros(len(correct_without)), correct_without, correct_with)


def normalised_area(scores: Any, correct_without: Any, correct_with: Any) -> float:
    """(AUC - AUC_random) / (AUC_oracle - AUC_random): 0 chooses blindly, 1 is the oracle, below 0 chooses
    wrongly.

    NaN where retrieval changes no answer, so that there is nothing to choose.
    """
    blind = random_curve(correct_without, correct_with).area
    best = oracle_curve(correct_without, correct_with).area
    if best - blind < 1e-12:
        return float("nan")
    return (accuracy_curve(scores, correct_without, correct_with).area - blind) / (best - blind)


def _tie_ends(descending: np.ndarray) -> np.ndarray:
    """Positions of the last member of each group of equal scores."""
    return np.flatnonzero(np.append(descending[1:] != descending[:-1], True))
