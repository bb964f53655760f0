"""After training: make the probability honest, then choose where to cut it, on validation questions."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter1d

from expertrag_jax.evaluation.reliability import expected_calibration_error

__all__ = ["ThresholdChoice", "choose_threshold", "expected_calibration_error", "fit_platt"]


def fit_platt(logits: Any, needed: Any, max_steps: int = 100) -> tuple[float, float]:
    """Platt scaling: (scale, bias) such that sigmoid(scale * logit + bias) is the frequency of need.

    Newton's method with step halving on the cross-entropy against Platt's smoothed targets (n+ + 1)/(n+ + 2)
    and 1/(n- + 2) (Platt 1999; Lin, Lin & Weng 2007), which keep the fit finite when the logits separate the
    classes.

    Args:
      logits: [N] the gate's logits.
      needed: [N] 1 needed, 0 not, NaN unknown (ignored).
      max_steps: most Newton steps.

    Returns:
      (scale, bias). With one class only there is nothing to fit, so (1, 0): the order of the questions is
        kept.

    Raises:
      ValueError: no known label, or a logit that is not finite.
    """
    logits, needed = np.asarray(logits, np.float64).ravel(), np.asarray(needed, np.float64).ravel()
    known = ~np.isnan(needed)
    logits, positive = logits[known], needed[known] > 0.5
    if not len(logits):
        raise ValueError("calibration needs at least one question whose need is known")
    if not np.isfinite(logits).all():
        raise ValueError("calibration needs finite logits")
    if positive.all() or not positive.any() or np.ptp(logits) == 0:
        return 1.0, 0.0
    n_positive, n_negative = positive.sum(), (~positive).sum()
    target = np.where(positive, (n_positive + 1) / (n_positive + 2), 1 / (n_negative + 2))
    design = np.stack([logits, np.ones_like(logits)], axis=1)

    def loss(line):
        z = design @ line
        return np.sum(np.logaddexp(0, z) - target * z)

    line = np.array([0.0, np.log((n_positive + 1) / (n_negative + 1))])
    for _ in range(max_steps):
        p = 1 / (1 + np.exp(-np.clip(design @ line, -700, 700)))
        gradient = design.T @ (p - target)
        if np.abs(gradient).max() < 1e-9 * len(logits):
            break
        curvature = (design * (p * (1 - p))[:, None]).T @ design + 1e-12 * np.eye(2)
        step, size, before = np.linalg.solve(curvature, gradient), 1.0, loss(line)
        while loss(line - size * step) > before and size > 1e-10:
            size /= 2
        line = line - size * step
    return float(line[0]), float(line[1])


@dataclasses.dataclass(frozen=True)
class ThresholdChoice:
    """A threshold on p_ret and what it gave on the questions that chose it.

    Attributes:
      threshold: retrieve when p_ret >= threshold.
      retrieval_rate: fraction of the questions that retrieve.
      accuracy: with that threshold.
      accuracy_always, accuracy_never: of the two constant policies, for comparison.
    """

    threshold: float
    retrieval_rate: float
    accuracy: float
    accuracy_always: float
    accuracy_never: float


def choose_threshold(
    p_ret: Any, correct_without: Any, correct_with: Any, price: float, smoothing: float = 0.03, budget: float = 1.0
) -> ThresholdChoice:
    """Cut p_ret on validation questions where accuracy - price * rate is highest: the gate's own objective.

    Near its top this is flat, so a price alone leaves the rate to chance: other questions of the same kind choose one
    ten points away. A ``budget`` with a low price holds it, to chance again on other questions.

    Which of a hundred neighbouring questions evidence helps is chance, and the highest of raw sums follows it. So
    each question's gain (correct with minus correct without) is first replaced by a mean over its neighbours in
    p_ret (docs/results/almanac.md has what it is worth).

    Args:
      p_ret: [N] probabilities of retrieving.
      correct_without, correct_with: [N] bool or scores in [0, 1], the answer without and with evidence.
      price: accuracy that one retrieval per question must be worth, a fraction.
      smoothing: standard deviation of the neighbours' Gaussian weights, as a fraction of N; 0: raw gains.
      budget: highest fraction of these questions that may retrieve; of others a few more may.

    Returns:
      the choice, the lowest rate among equals; its threshold is a float32 between two questions' probabilities, so
      that it cuts the same in numpy and on an accelerator.

    Raises:
      ValueError: no questions, shapes that differ, a negative smoothing or a budget outside of [0, 1].
    """
    p_ret = np.asarray(p_ret, np.float32)  # the gate's precision: what is equal there is equal here
    without, with_ = np.asarray(correct_without, np.float64), np.asarray(correct_with, np.float64)
    if not len(p_ret) or not p_ret.shape == without.shape == with_.shape:
        raise ValueError(f"shapes {p_ret.shape}, {without.shape}, {with_.shape} must be equal and not empty")
    if smoothing < 0:
        raise ValueError(f"smoothing is {smoothing}, it must not be negative")
    if not 0 <= budget <= 1:
        raise ValueError(f"budget is {budget}, it must lie in [0, 1]")
    order = np.argsort(-p_ret, kind="stable")
    sorted_p, gain = p_ret[order], (with_ - without)[order]
    first = np.r_[True, sorted_p[1:] != sorted_p[:-1]]  # of a group of equal probabilities, which have no order
    groups = np.cumsum(first) - 1
    smooth = (np.bincount(groups, gain) / np.bincount(groups))[groups]
    if smoothing:
        # Reflected at the ends, every question counts exactly once.
        smooth = gaussian_filter1d(smooth, smoothing * len(gain), mode="reflect")
    utility = np.concatenate([[0], np.cumsum(smooth - price)])
    utility = np.where(np.r_[first, True], utility, -np.inf)  # a cut inside a group does not exist
    utility[int(budget * len(gain) + 1e-9) + 1 :] = -np.inf
    # 1e-9: sums in another order must not turn equal into less.
    retrieved = int(np.argmax(utility >= utility.max() - 1e-9))
    return ThresholdChoice(
        _cut(sorted_p, retrieved),
        retrieved / len(p_ret),
        float((without.sum() + gain[:retrieved].sum()) / len(p_ret)),
        float(with_.mean()),
        float(without.mean()),
    )


def _cut(sorted_p: np.ndarray, retrieved: int) -> float:
    """A threshold that exactly the first ``retrieved`` of the descending probabilities reach."""
    if retrieved == len(sorted_p):
        return 0.0
    below = sorted_p[retrieved]
    above = max(np.float32(1), below) if retrieved == 0 else sorted_p[retrieved - 1]
    middle = np.float32((above + below) / 2)
    # Neighbouring floats have no number between them, and 1 has no probability above: take the next float
    # then.
    return float(middle if middle > below else np.nextafter(below, np.float32(np.inf)))
