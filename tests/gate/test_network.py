from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from expertrag_jax.gate import network
from expertrag_jax.gate.objective import supervised_bce


def _init(gate, width=5, rows=3):
    return gate.init(jax.random.key(0), jnp.ones((rows, width)))["params"]


def test_gate_features_equal_the_definition_row_by_row():
    rng = np.random.default_rng(0)
    pooled = rng.normal(size=(4, 3)).astype(np.float32)
    log_probs = np.array(jax.nn.log_softmax(rng.normal(size=(4, 7)) * 3), np.float64)
    log_probs[1] = [0.0] + [-np.inf] * 6  # certain: entropy 0, margin 1
    log_probs[2] = np.log(np.full(7, 1 / 7))
    features = np.asarray(network.gate_features(jnp.asarray(pooled), jnp.asarray(log_probs)))
    assert features.shape == (4, 5) and features.dtype == np.float32
    for row in range(4):
        p = np.exp(log_probs[row])
        entropy = -sum(x * np.log(x) for x in p if x > 0)
        first, second = sorted(p)[::-1][:2]
        np.testing.assert_allclose(features[row], [*pooled[row], entropy, first - second], atol=1e-5)
    np.testing.assert_allclose(features[1, -2:], [0, 1], atol=1e-6)
    np.testing.assert_allclose(features[2, -2:], [np.log(7), 0], atol=1e-5)


def test_entropy_of_forbidden_tokens_has_a_finite_gradient():
    def entropy(logits):
        log_probs = jnp.concatenate([jax.nn.log_softmax(logits), jnp.full((1, 1), -jnp.inf)], axis=1)
        return network.gate_features(jnp.zeros((1, 1)), log_probs)[0, 1]

    assert np.isfinite(jax.grad(entropy)(jnp.array([[1.0, 2.0]]))).all()


def test_without_a_hidden_layer_it_is_the_papers_equation():
    gate, rng = network.GateNetwork(hidden=0), np.random.default_rng(1)
    features = rng.normal(size=(6, 5)).astype(np.float32)
    params = _init(gate)
    assert set(params) == {"feature_mean", "feature_scale", "output", "calibration"}
    w, b = rng.normal(size=(5, 1)).astype(np.float32), np.float32(0.3)
    params = {**params, "output": {"kernel": w, "bias": np.array([b])}}
    logit = gate.apply({"params": params}, features)
    np.testing.assert_allclose(logit, features @ w[:, 0] + b, rtol=1e-5)
    np.testing.assert_allclose(
        network.retrieval_probability(params, logit), 1 / (1 + np.exp(-(features @ w[:, 0] + b))), rtol=1e-5
    )


def test_an_untrained_gate_is_undecided():
    gate = network.GateNetwork(hidden=8)
    params = _init(gate)
    p = network.retrieval_probability(params, gate.apply({"params": params}, jnp.full((2, 5), 7.0)))
    np.testing.assert_array_equal(p, [0.5, 0.5])


def test_standardise_makes_a_gate_blind_to_the_features_units():
    rng = np.random.default_rng(2)
    features = rng.normal(size=(50, 5)).astype(np.float32)
    features[:, 3] = 4.0  # does not vary
    shift, unit = rng.normal(size=5) * 10, np.array([1e-3, 1, 10, 1, 100])
    gate = network.GateNetwork(hidden=4, activation="gelu")
    params = _init(gate)
    params["output"]["kernel"] = rng.normal(size=(4, 1)).astype(np.float32)
    plain = network.standardise(params, features)
    other = network.standardise(params, features * unit + shift)
    np.testing.assert_allclose(plain["feature_mean"], features.mean(0), atol=1e-6)
    np.testing.assert_allclose(
        plain["feature_scale"], [*features.std(0)[:3], 1, features[:, 4].std()], rtol=1e-5
    )
    np.testing.assert_allclose(
        gate.apply({"params": plain}, features),
        gate.apply({"params": other}, features * unit + shift),
        atol=2e-3,
    )
    with pytest.raises(ValueError, match="statistics of 5"):
        network.standardise(params, features[:, :4])


def test_stored_statistics_and_calibration_get_no_gradient_and_are_not_trainable():
    gate = network.GateNetwork(hidden=4)
    params = _init(gate)
    params["output"]["kernel"] = jnp.ones((4, 1))
    features = jnp.asarray(np.random.default_rng(3).normal(size=(3, 5)))
    gradient = jax.grad(lambda p: jnp.sum(gate.apply({"params": p}, features)))(params)
    for path, leaf in traverse_util.flatten_dict({"gate": gradient}, sep="/").items():
        trained = re.fullmatch(network.TRAINABLE, path) is not None
        assert trained == path.startswith(("gate/hidden", "gate/output")), path
        assert trained == bool(np.any(leaf)), path


def test_logical_axes_have_the_structure_of_the_parameters():
    for hidden in (0, 4):
        params = _init(network.GateNetwork(hidden=hidden))
        axes = network.logical_axes(hidden)
        flat_params, flat_axes = (traverse_util.flatten_dict(tree) for tree in (params, axes))
        assert flat_params.keys() == flat_axes.keys()
        assert all(len(flat_axes[path]) == np.ndim(leaf) for path, leaf in flat_params.items())


def test_calibration_moves_the_probability_and_not_the_logit():
    gate = network.GateNetwork()
    params = _init(gate)
    params["output"]["bias"] = jnp.array([2.0])
    calibrated = network.with_calibration(params, 0.5, -3.0)
    logit = gate.apply({"params": calibrated}, jnp.ones((1, 5)))
    np.testing.assert_allclose(logit, [2.0])
    np.testing.assert_allclose(
        network.retrieval_probability(calibrated, logit), [1 / (1 + np.exp(2.0))], rtol=1e-6
    )
    assert float(params["calibration"]["scale"]) == 1.0  # the old tree is as it was


def test_dropout_leaves_the_uncertainty_features_alone():
    gate = network.GateNetwork(dropout_rate=0.9, dropout_width=3)
    params = _init(gate)
    params["output"]["kernel"] = jnp.array([[0.0], [0.0], [0.0], [1.0], [1.0]])
    logit = gate.apply(
        {"params": params}, jnp.ones((20, 5)), deterministic=False, rngs={"dropout": jax.random.key(1)}
    )
    np.testing.assert_allclose(logit, 2.0)
    params["output"]["kernel"] = jnp.ones((5, 1))
    logit = gate.apply(
        {"params": params}, jnp.ones((20, 5)), deterministic=False, rngs={"dropout": jax.random.key(1)}
    )
    assert np.ptp(logit) > 0


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="relu6"):
        _init(network.GateNetwork(activation="relu6"))


def test_it_learns_what_only_both_kinds_of_feature_tell():
    rng = np.random.default_rng(4)
    features = rng.normal(size=(400, 5)) * [1, 1, 1, 5, 0.1] + [0, 0, 0, 3, 0.5]
    needed = ((features[:, 0] > 0) | (features[:, 3] > 6)).astype(np.float32)
    gate = network.GateNetwork(hidden=16)
    params = network.standardise(_init(gate), features)
    optimizer = optax.adam(0.05)
    state = optimizer.init(params)

    def loss(p):
        total, count = supervised_bce(gate.apply({"params": p}, jnp.asarray(features)), jnp.asarray(needed))
        return total / count

    @jax.jit
    def step(p, s):
        updates, s = optimizer.update(jax.grad(loss)(p), s)
        return optax.apply_updates(p, updates), s

    for _ in range(150):
        params, state = step(params, state)
    p = network.retrieval_probability(params, gate.apply({"params": params}, features))
    assert np.mean((np.asarray(p) > 0.5) == needed) > 0.95
