from __future__ import annotations

import numpy as np
import pytest

from expertrag_jax.evaluation import gating, intervals


def test_with_one_question_per_fact_it_is_the_textbook_interval():
    values = (np.random.default_rng(0).random(2000) < 0.7).astype(float)
    low, high = intervals.mean_interval(values, np.arange(2000), seed=1)
    half = 1.96 * np.sqrt(values.var() / 2000)
    assert low == pytest.approx(values.mean() - half, abs=0.004)
    assert high == pytest.approx(values.mean() + half, abs=0.004)


def test_questions_about_one_fact_are_no_further_evidence():
    values = (np.random.default_rng(0).random(300) < 0.7).astype(float)
    once = intervals.mean_interval(values, np.arange(300), seed=2)
    # every fact asked four times with the same outcome, in a shuffled order
    order = np.random.default_rng(3).permutation(1200)
    many = intervals.mean_interval(np.tile(values, 4)[order], np.tile(np.arange(300), 4)[order], seed=2)
    assert many == pytest.approx(once)
    blind = intervals.mean_interval(np.tile(values, 4)[order], np.arange(1200), seed=2)
    assert (blind[1] - blind[0]) < 0.6 * (once[1] - once[0])


def test_coverage_is_near_its_level():
    rng, inside = np.random.default_rng(4), 0
    for trial in range(200):
        facts = rng.random(150) < 0.6
        size = rng.integers(1, 3, 150)  # a fact is asked once or twice
        clusters = np.repeat(np.arange(150), size)
        low, high = intervals.mean_interval(facts[clusters], clusters, replicates=200, seed=trial)
        inside += low <= 0.6 <= high
    assert 0.88 <= inside / 200 <= 0.99


def test_weights_enter_as_in_the_mean():
    values, weights = np.array([1.0, 0.0, 0.0]), np.array([2.0, 1.0, 1.0])
    assert intervals.weighted_mean(values, weights) == 0.5
    assert intervals.mean_interval([1.0, 0.0], [0, 1], weights=[1.0, 0.0], seed=0)[1] == 1.0
    with pytest.raises(ValueError, match="positive weight"):
        intervals.weighted_mean([])


def test_any_statistic_by_its_rows():
    rng = np.random.default_rng(5)
    values, clusters = rng.random(400), rng.integers(0, 100, 400)
    by_rows = intervals.statistic_interval(lambda rows: values[rows].mean(), clusters, seed=6)
    assert by_rows == pytest.approx(intervals.mean_interval(values, clusters, seed=6))
    scores = rng.random(400)
    low, high = intervals.statistic_interval(
        lambda rows: gating.auroc(scores[rows], values[rows] > 0.5), clusters
    )
    assert low < 0.5 < high
    nothing = intervals.statistic_interval(lambda rows: float("nan"), clusters, replicates=3)
    assert np.isnan(nothing).all()


def test_a_seed_fixes_the_interval():
    values = np.random.default_rng(7).random(50)
    first, second = (intervals.mean_interval(values, np.arange(50), seed=8) for _ in range(2))
    assert first == second != intervals.mean_interval(values, np.arange(50), seed=9)
