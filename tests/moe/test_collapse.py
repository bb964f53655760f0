"""The alarm names a collapsed layer once, over a window, with what to do."""

import numpy as np

from expertrag_jax.moe.collapse import CollapseAlarm, experts_taking

EVEN, SKEWED = [0.125] * 8, [0.5, 0.3, 0.16, 0.008, 0.008, 0.008, 0.008, 0.008]


def test_experts_taking_a_share():
    loads = np.array([EVEN, SKEWED, [1, 0, 0, 0, 0, 0, 0, 0], [0.4, 0.3, 0.15, 0.1, 0.05, 0, 0, 0]])
    assert experts_taking(loads, 0.95).tolist() == [8, 3, 1, 4]


def test_a_collapsed_layer_is_named_once_and_again_after_recovery():
    alarm = CollapseAlarm(window=100)

    def observe(step, *layers):
        return alarm.observe({"step": step, "router/load": list(layers)})

    assert observe(10, EVEN, EVEN) == []
    assert observe(60, EVEN, SKEWED) == []  # the mean over the window is still even enough
    (warning,) = observe(110, EVEN, SKEWED)  # the first record has left the window
    assert "step 110" in warning and "sparse layer 2, 3 of 8" in warning and "AUX_LOSS_FACTOR" in warning
    assert observe(160, EVEN, SKEWED) == []
    assert observe(300, EVEN, EVEN) == [] and len(observe(500, SKEWED, SKEWED)) == 2
    assert alarm.observe({"step": 501, "loss": 1.0}) == []
    assert observe(502, EVEN) == []  # another model


def test_half_of_the_experts_is_no_collapse():
    four = [0.25, 0.25, 0.25, 0.25, 0, 0, 0, 0]
    three = [0.4, 0.3, 0.3, 0, 0, 0, 0, 0]
    for load, warnings in ((four, 0), (three, 1)):
        alarm = CollapseAlarm(window=200)
        assert alarm.observe({"step": 20, "router/load": [load]}) == []  # too early to tell
        assert len(alarm.observe({"step": 220, "router/load": [load]})) == warnings
