from __future__ import annotations

import numpy as np
import pytest

from expertrag_jax.evaluation import reliability


def test_bins_and_error_equal_a_loop():
    rng = np.random.default_rng(0)
    p, labels = rng.random(500), rng.random(500) < 0.3
    p[:3] = [0.0, 1.0, 0.2]
    error, groups = 0.0, []
    for low in range(10):
        inside = [i for i in range(500) if min(int(p[i] * 10), 9) == low]
        if inside:
            groups.append((p[inside].mean(), labels[inside].mean(), len(inside)))
            error += len(inside) / 500 * abs(p[inside].mean() - labels[inside].mean())
    bins = reliability.reliability_bins(p, labels, bins=10)
    np.testing.assert_allclose(np.stack([bins.probability, bins.frequency, bins.count], 1), groups)
    assert reliability.expected_calibration_error(p, labels, bins=10) == pytest.approx(error)


def test_certain_and_right_is_perfect_certain_and_wrong_is_one():
    assert reliability.expected_calibration_error([0, 1, 1], [0, 1, 1]) == 0
    assert reliability.expected_calibration_error([0, 1, 1], [1, 0, 0]) == 1


def test_unknown_labels_are_ignored():
    assert reliability.expected_calibration_error([0.5, 0.5, 0.9], [1, 0, np.nan]) == 0
    with pytest.raises(ValueError, match="known"):
        reliability.reliability_bins([0.5], [np.nan])
    with pytest.raises(ValueError, match="labels"):
        reliability.reliability_bins([0.5], [1, 0])
