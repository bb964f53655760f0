from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from expertrag_jax.evaluation import gating


def _case(seed, n=40, levels=6):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, levels, n) / levels  # many ties
    return scores, rng.random(n) < 0.5, rng.random(n) < 0.8


@pytest.mark.parametrize("seed", range(4))
def test_auroc_counts_pairs(seed):
    scores, labels, _ = _case(seed)
    pairs = [(p > n) + (p == n) / 2 for p in scores[labels] for n in scores[~labels]]
    assert gating.auroc(scores, labels) == pytest.approx(np.mean(pairs))
    assert gating.auroc(-scores, labels) == pytest.approx(1 - np.mean(pairs))
    assert math.isnan(gating.auroc(scores, np.ones(len(scores))))


@pytest.mark.parametrize("seed", range(4))
def test_average_precision_walks_the_distinct_thresholds(seed):
    scores, labels, _ = _case(seed)
    expected, before = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        retrieved = scores >= threshold
        recall = (labels & retrieved).sum() / labels.sum()
        expected += (recall - before) * (labels & retrieved).sum() / retrieved.sum()
        before = recall
    assert gating.average_precision(scores, labels) == pytest.approx(expected)
    assert gating.average_precision(labels, labels) == 1
    assert math.isnan(gating.average_precision(scores, np.zeros(len(scores))))


def test_need_and_harm():
    without, with_ = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    assert gating.retrieval_needed(without, with_).tolist() == [False, True, False, False]
    assert gating.retrieval_harmful(without, with_).tolist() == [False, False, True, False]


@pytest.mark.parametrize("seed", range(4))
def test_curve_points_are_policies_and_ties_are_broken_at_random(seed):
    scores, without, with_ = _case(seed, n=30)
    curve = gating.accuracy_curve(scores, without, with_)
    for threshold in sorted(set(scores)):
        retrieve = scores >= threshold
        at = np.interp(retrieve.mean(), curve.rate, curve.accuracy)
        assert at == pytest.approx(np.where(retrieve, with_, without).mean())
    assert curve.accuracy[0] == pytest.approx(without.mean())
    assert curve.accuracy[-1] == pytest.approx(with_.mean())
    # the mean over random orders of the tied questions, at every count
    rng, total = np.random.default_rng(9), np.zeros(31)
    for _ in range(4000):
        order = np.lexsort((rng.random(30), -scores))
        total += np.concatenate([[0], np.cumsum((with_.astype(float) - without)[order])])
    accuracy = (without.sum() + total / 4000) / 30
    np.testing.assert_allclose(
        np.interp(np.arange(31) / 30, curve.rate, curve.accuracy), accuracy, atol=0.005
    )


def test_oracle_is_the_best_of_all_orders():
    without, with_ = np.array([0, 1, 0, 1, 0, 1]), np.array([1, 1, 0, 0, 1, 0])
    best = gating.oracle_curve(without, with_)
    rates = np.arange(7) / 6
    at_best = np.interp(rates, best.rate, best.accuracy)
    for order in itertools.permutations(range(6)):
        curve = gating.accuracy_curve(-np.argsort(order), without, with_)
        assert (np.interp(rates, curve.rate, curve.accuracy) <= at_best + 1e-12).all()


def test_normalised_area_of_the_oracle_a_constant_and_the_reverse():
    _, without, with_ = _case(5, n=200)
    gain = with_.astype(float) - without
    assert gating.normalised_area(gain, without, with_) == pytest.approx(1)
    assert gating.normalised_area(np.ones(200), without, with_) == pytest.approx(0)
    assert gating.normalised_area(-gain, without, with_) == pytest.approx(-1)
    assert math.isnan(gating.normalised_area(gain, without, without))


def test_area_is_the_mean_over_rates():
    scores, without, with_ = _case(6)
    curve = gating.accuracy_curve(scores, without, with_)
    fine = np.linspace(0, 1, 100_001)
    assert curve.area == pytest.approx(np.interp(fine, curve.rate, curve.accuracy).mean(), abs=1e-4)
    thin = curve.thinned(11)
    assert len(thin.rate) == 11 and thin.accuracy[-1] == pytest.approx(with_.mean())
