from __future__ import annotations

import numpy as np
import pytest

from expertrag_jax.evaluation import cost


def test_the_bound_is_reached_by_a_free_gate():
    never, always, rate = 2.0, 10.0, 0.4
    free_gate = rate * always + (1 - rate) * never
    f = cost.avoidable_share(never, always)
    assert f == pytest.approx(0.8)
    assert cost.speed_up_bound(rate, f) == pytest.approx(always / free_gate)
    assert cost.speed_up_bound(1.0, f) == 1 and cost.avoidable_share(3.0, 2.0) == 0


def test_summary_takes_medians_of_interleaved_timings():
    seconds = {"never": [2, 2, 99, 2, 2], "always": [10, 11, 10, 90, 10], "gate": [5, 5.5, 5, 5, 70]}
    summary = cost.summarise_speed_up(seconds, retrieval_rate=0.3)
    assert summary.speed_up == pytest.approx(2) and summary.avoidable_share == pytest.approx(0.8)
    assert summary.bound == pytest.approx(1 / (1 - 0.7 * 0.8))
    assert summary.fraction_of_bound == pytest.approx(2 * (1 - 0.7 * 0.8))
    with pytest.raises(ValueError, match="equally many"):
        cost.summarise_speed_up({"never": [1], "always": [1, 2], "gate": [1]}, 0.3)


def test_latencies_in_milliseconds():
    assert cost.latency_percentiles(np.arange(101) / 1000) == pytest.approx((50, 95))
