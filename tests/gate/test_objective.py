from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from expertrag_jax.gate import objective


def _brute_utility(logit, gain, price, temperature):
    """Expected utility by enumerating both actions, in float64."""
    p = 1 / (1 + np.exp(-logit))
    value = 0.0
    for action, probability in ((1, p), (0, 1 - p)):
        value += probability * (action * (gain - price) - temperature * np.log(probability))
    return value


def test_expected_utility_equals_both_actions_enumerated():
    logit, gain = np.array([-2.0, 0.0, 0.7, 3.0]), np.array([0.9, -0.3, 0.2, 0.0])
    total, count = objective.expected_utility_loss(jnp.asarray(logit), jnp.asarray(gain), 0.1, 0.05)
    assert float(count) == 4
    np.testing.assert_allclose(
        -total, sum(_brute_utility(row, g, 0.1, 0.05) for row, g in zip(logit, gain)), rtol=1e-5
    )


def test_gradient_equals_central_differences_of_the_enumeration():
    for logit, gain in [(-1.5, 0.4), (0.0, -0.2), (2.0, 1.0), (5.0, 0.01)]:
        gradient = jax.grad(
            lambda x, g=gain: objective.expected_utility_loss(x, jnp.array([g]), 0.1, 0.05)[0]
        )(jnp.array([logit]))
        h = 1e-5
        brute = (_brute_utility(logit - h, gain, 0.1, 0.05) - _brute_utility(logit + h, gain, 0.1, 0.05)) / (
            2 * h
        )
        np.testing.assert_allclose(gradient[0], brute, rtol=1e-3, atol=1e-7)


def test_the_optimum_is_the_sigmoid_of_the_mean_advantage_over_temperature():
    gains, price, temperature = jnp.array([0.9, 0.1, -0.4, 0.6]), 0.1, 0.2  # one x, four outcomes

    def loss(logit):
        total, count = objective.expected_utility_loss(jnp.full(4, logit), gains, price, temperature)
        return float(total / count)

    best = optimize.minimize_scalar(loss, bounds=(-10, 10), method="bounded", options={"xatol": 1e-6}).x
    np.testing.assert_allclose(best, (float(gains.mean()) - price) / temperature, atol=2e-3)


def test_price_alone_decides_where_nothing_is_gained():
    gradient = jax.grad(lambda x: objective.expected_utility_loss(x, jnp.zeros(1), 0.1, 0.0)[0])(jnp.zeros(1))
    assert gradient[0] > 0  # descending lowers the logit
    gradient = jax.grad(lambda x: objective.expected_utility_loss(x, jnp.zeros(1), 0.0, 0.0)[0])(jnp.zeros(1))
    assert gradient[0] == 0


def test_supervised_bce_ignores_unknown_labels_in_value_and_gradient():
    logit = jnp.array([1.0, -2.0, 0.5, 3.0])
    needed = jnp.array([1.0, 0.0, jnp.nan, 0.25])
    total, count = objective.supervised_bce(logit, needed)
    p = 1 / (1 + np.exp(-np.asarray(logit, np.float64)))
    expected = -np.log(p[0]) - np.log(1 - p[1]) - 0.25 * np.log(p[3]) - 0.75 * np.log(1 - p[3])
    assert float(count) == 3
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    gradient = jax.grad(lambda x: objective.supervised_bce(x, needed)[0])(logit)
    np.testing.assert_allclose(gradient, [p[0] - 1, p[1], 0, p[3] - 0.25], rtol=1e-5)


def test_weights_scale_total_and_count():
    logit, gain = jnp.array([0.3, -0.2]), jnp.array([0.5, jnp.nan])
    single = objective.expected_utility_loss(logit[:1], gain[:1], 0.1, 0.1)
    total, count = objective.expected_utility_loss(logit, gain, 0.1, 0.1, weights=jnp.array([3.0, 5.0]))
    np.testing.assert_allclose((total, count), (3 * single[0], 3), rtol=1e-6)


@pytest.mark.parametrize("baseline", [0.0, 0.4])
def test_reinforce_has_the_expected_utilitys_gradient_whatever_the_baseline(baseline):
    logit, gain, price, temperature = jnp.array([-1.0, 0.2, 2.0]), jnp.array([0.8, -0.5, 0.3]), 0.15, 0.07
    p = jax.nn.sigmoid(logit)
    expectation = jnp.zeros(3)
    for action, probability in ((True, p), (False, 1 - p)):
        reward = jnp.where(action, gain - price, 0.0)
        gradient = jax.grad(
            lambda x, a=action, r=reward: objective.reinforce_loss(
                x, jnp.full(3, a), r, baseline, temperature
            )[0]
        )(logit)
        expectation += probability * gradient
    exact = jax.grad(lambda x: objective.expected_utility_loss(x, gain, price, temperature)[0])(logit)
    np.testing.assert_allclose(expectation, exact, rtol=1e-4, atol=1e-7)


def test_a_good_baseline_lowers_the_variance_of_reinforce():
    logit, gain = jnp.zeros(4000), jnp.full(4000, 1.0)
    action = jax.random.bernoulli(jax.random.key(0), 0.5, (4000,))
    reward = jnp.where(action, 5.0 + gain, 5.0)

    def variance(baseline):
        gradient = jax.grad(lambda x: objective.reinforce_loss(x, action, reward, baseline)[0])(logit)
        return float(jnp.var(gradient))

    assert variance(5.5) < variance(0.0) / 50


def test_gains_of_both_kinds():
    closed, opened = -jnp.log(jnp.array([0.2, 0.9])), -jnp.log(jnp.array([0.8, 0.6]))
    np.testing.assert_allclose(objective.gain_from_losses(closed, opened), [0.6, -0.3], rtol=1e-5)
    np.testing.assert_allclose(
        objective.gain_from_losses(closed, opened, "log_likelihood"), np.log([4, 2 / 3]), rtol=1e-5
    )
    np.testing.assert_array_equal(
        jax.grad(lambda x: objective.gain_from_losses(x, opened).sum())(closed), [0, 0]
    )
    with pytest.raises(ValueError, match="probability"):
        objective.gain_from_losses(closed, opened, "probability")


def test_latent_decision_is_the_mixtures_likelihood_and_reaches_both_readers():
    logit, closed, opened = jnp.array([0.4, 1.0]), jnp.array([2.0, jnp.nan]), jnp.array([0.5, 1.0])
    total, count = objective.latent_decision_loss(logit, closed, opened, price=0.1)
    p = 1 / (1 + np.exp(-0.4))
    mixture = p * np.exp(-0.5) + (1 - p) * np.exp(-2.0)
    assert float(count) == 1
    np.testing.assert_allclose(total, -np.log(mixture) + 0.1 * p, rtol=1e-5)
    gradient = jax.grad(lambda c, o: objective.latent_decision_loss(logit, c, o)[0], argnums=(0, 1))(
        closed, opened
    )
    posterior = p * np.exp(-0.5) / mixture  # d/d open_nll is the posterior of having retrieved
    np.testing.assert_allclose(gradient[1], [posterior, 0], rtol=1e-5)
    np.testing.assert_allclose(gradient[0], [1 - posterior, 0], rtol=1e-5)


def test_straight_through_is_hard_forward_and_soft_backward():
    logit = jnp.array([-0.1, 0.1, 2.0])
    np.testing.assert_allclose(objective.straight_through(logit), [0, 1, 1], atol=1e-6)
    p = np.asarray(jax.nn.sigmoid(logit))
    gradient = jax.grad(lambda x: objective.straight_through(x).sum())(logit)
    np.testing.assert_allclose(gradient, p * (1 - p), rtol=1e-5)


def test_entropy_is_exact_for_large_logits():
    logit = jnp.array([-80.0, 0.0, 80.0])
    np.testing.assert_allclose(objective.binary_entropy(logit), [0, np.log(2), 0], atol=1e-6)
    assert np.isfinite(jax.grad(lambda x: objective.binary_entropy(x).sum())(logit)).all()
