from __future__ import annotations

import numpy as np
import pytest
from scipy import optimize

from expertrag_jax.gate import calibration


def _world(n=4000, scale=1.7, bias=-0.6, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=n) * 2
    needed = rng.random(n) < 1 / (1 + np.exp(-(scale * logits + bias)))
    return logits, needed.astype(np.float64)


def test_platt_recovers_the_line_and_lowers_the_calibration_error():
    logits, needed = _world()
    scale, bias = calibration.fit_platt(logits, needed)
    assert abs(scale - 1.7) < 0.15 and abs(bias + 0.6) < 0.12
    raw, fitted = 1 / (1 + np.exp(-logits)), 1 / (1 + np.exp(-(scale * logits + bias)))
    assert calibration.expected_calibration_error(fitted, needed) < 0.03
    assert calibration.expected_calibration_error(raw, needed) > 0.06


def test_platt_equals_a_general_optimiser_on_the_smoothed_targets():
    logits, needed = _world(60, seed=1)
    positives, negatives = needed.sum(), (1 - needed).sum()
    target = np.where(needed > 0, (positives + 1) / (positives + 2), 1 / (negatives + 2))

    def loss(line):
        z = line[0] * logits + line[1]
        return np.sum(np.logaddexp(0, z) - target * z)

    best = optimize.minimize(loss, [0.0, 0.0], method="BFGS", options={"gtol": 1e-9}).x
    np.testing.assert_allclose(calibration.fit_platt(logits, needed), best, atol=1e-4)


def test_platt_stays_finite_when_the_classes_are_separated():
    logits = np.concatenate([np.linspace(-50, -1, 20), np.linspace(1, 50, 20)])
    scale, bias = calibration.fit_platt(logits, (logits > 0).astype(float))
    assert np.isfinite([scale, bias]).all() and scale > 0


def test_platt_ignores_unknown_labels_and_keeps_the_order_with_one_class():
    logits, needed = _world(200)
    padded = np.concatenate([logits, [100.0, -100.0]]), np.concatenate([needed, [np.nan, np.nan]])
    assert calibration.fit_platt(*padded) == calibration.fit_platt(logits, needed)
    assert calibration.fit_platt(logits, np.ones(200)) == (1.0, 0.0)
    with pytest.raises(ValueError, match="known"):
        calibration.fit_platt(logits, np.full(200, np.nan))


def _brute_choices(p, without, with_):
    """(threshold, rate, accuracy) of every threshold worth trying, by deciding again each time."""
    choices = []
    for threshold in [2.0, *sorted(set(p.tolist()), reverse=True)]:
        retrieve = p >= threshold
        choices.append((threshold, retrieve.mean(), np.where(retrieve, with_, without).mean()))
    return choices


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("price", [0.0, 0.2, 1.0])
def test_threshold_equals_brute_force_with_ties(price, seed):
    rng = np.random.default_rng(seed)
    p = (rng.integers(0, 20, 100) / 19).astype(np.float32)
    without, with_ = rng.random(100) < 1 - p, rng.random(100) < 0.85
    choice = calibration.choose_threshold(p, without, with_, price, smoothing=0)
    best = max(accuracy - price * rate for _, rate, accuracy in _brute_choices(p, without, with_))
    rate = min(rate for _, rate, accuracy in _brute_choices(p, without, with_) if accuracy - price * rate > best - 1e-9)
    assert choice.accuracy - price * choice.retrieval_rate == pytest.approx(best)
    retrieve = p >= np.float32(choice.threshold)
    assert choice.retrieval_rate == pytest.approx(rate) and retrieve.mean() == pytest.approx(rate)
    assert np.where(retrieve, with_, without).mean() == pytest.approx(choice.accuracy)


def test_smoothing_loses_less_to_chance_than_raw_gains_do():
    def expected_gain(p):
        return np.clip(0.6 * (p - 0.25), 0, 1)

    def regret(threshold):
        grid = np.linspace(0, 1, 2001)
        worth = expected_gain(grid) - 0.05
        return (np.maximum(worth, 0) - np.where(grid >= threshold, worth, 0)).mean()

    lost = {0.0: 0.0, 0.03: 0.0}
    for seed in range(60):
        rng = np.random.default_rng(seed)
        p = rng.random(1200).astype(np.float32)
        chance = rng.random(1200)
        with_, without = chance < 0.98, chance < 0.98 - expected_gain(p)
        for smoothing in lost:
            lost[smoothing] += regret(calibration.choose_threshold(p, without, with_, 0.05, smoothing).threshold)
    assert lost[0.03] < 0.8 * lost[0.0]


def test_smoothing_counts_every_question_once_and_no_order_among_equals():
    p = np.full(1200, 0.5, np.float32)
    helped = np.arange(1200) < 38  # at one end: 3% of the questions, less than the price
    choice = calibration.choose_threshold(p, ~helped, np.ones(1200), price=0.05)
    assert choice.retrieval_rate == 0
    rng = np.random.default_rng(0)
    p = (rng.integers(0, 30, 600) / 29).astype(np.float32)
    without, with_ = rng.random(600) < 1 - p, rng.random(600) < 0.9
    order = rng.permutation(600)
    choices = [calibration.choose_threshold(p[i], without[i], with_[i], 0.3) for i in (slice(None), order)]
    assert choices[0] == choices[1] and 0 < choices[0].retrieval_rate < 1


@pytest.mark.parametrize("budget,price,rate", [(1.0, 0.0, 0.8), (0.5, 0.0, 0.48), (0.33, 0.0, 0.32), (0.5, 0.6, 0.4)])
def test_a_budget_bounds_the_rate_where_the_price_would_not(budget, price, rate):
    p = np.repeat(np.linspace(1, 0, 25, dtype=np.float32), 4)  # groups of four, all of which retrieve or none
    gain = np.concatenate([np.ones(40), np.full(40, 0.5), np.full(20, -0.5)])  # worth it for 80% at no price, 40% at .6
    choice = calibration.choose_threshold(p, np.zeros(100), gain, price, 0, budget)
    assert choice.retrieval_rate == (p >= np.float32(choice.threshold)).mean() == rate
    assert choice.accuracy == pytest.approx(gain[: round(100 * rate)].sum() / 100)


def test_thresholds_at_both_ends_and_between_neighbouring_floats():
    p = np.array([1.0, 1.0, 0.5], np.float32)
    never = calibration.choose_threshold(p, [1, 1, 1], [0, 0, 0], price=0.0)
    assert never.retrieval_rate == 0 and not (p >= np.float32(never.threshold)).any()
    always = calibration.choose_threshold(p, [0, 0, 0], [1, 1, 1], price=0.0)
    assert always.retrieval_rate == 1 and (p >= np.float32(always.threshold)).all()
    near = np.array([np.nextafter(np.float32(0.5), np.float32(1)), 0.5], np.float32)
    one = calibration.choose_threshold(near, [0, 1], [1, 1], price=0.1)
    assert (near >= np.float32(one.threshold)).tolist() == [True, False]


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="smoothing"):
        calibration.choose_threshold([0.5], [1], [1], price=0.0, smoothing=-1.0)
    with pytest.raises(ValueError, match="budget is 1.5"):
        calibration.choose_threshold([0.5], [1], [1], price=0.0, budget=1.5)
    with pytest.raises(ValueError, match="shapes"):
        calibration.choose_threshold([0.5, 0.6], [1], [1], price=0.0)
