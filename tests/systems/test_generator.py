"""Losses and metrics of the generator against brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from expertrag_jax.batch import Batch
from expertrag_jax.moe.statistics import RouterStatistics
from expertrag_jax.systems import generator
from expertrag_jax.training import step


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_cross_entropy(smoothing, z_loss):
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(2, 3, 5)) * 2, rng.integers(0, 5, (2, 3))
    expected = np.zeros((2, 3))
    for place in np.ndindex(2, 3):
        log_z = np.log(np.exp(logits[place]).sum())
        soft = np.full(5, smoothing / 4)
        soft[targets[place]] = 1 - smoothing
        entropy = -(soft[soft > 0] * np.log(soft[soft > 0])).sum()
        expected[place] = -(soft * (logits[place] - log_z)).sum() - entropy + z_loss * log_z**2
    ours = generator.cross_entropy(jnp.asarray(logits, jnp.float32), targets, smoothing, z_loss)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_router_losses_average_layers_and_groups_that_hold_tokens():
    rng = np.random.default_rng(1)

    def layer(tokens):
        groups = len(tokens)
        figures = {name: rng.random(groups) for name in generator.ROUTER_METRICS}
        return RouterStatistics(tokens=np.array(tokens, np.float32), load=rng.random((groups, 3)), **figures)

    encoder, decoder = layer([4, 0, 2]), layer([1, 1])
    collection = {
        "encoder": {"mlp": {"statistics": (encoder,)}},
        "decoder": {"mlp": {"statistics": (decoder,)}},
    }
    loss, metrics = generator.router_losses(collection, 0.5, 2.0)
    full = np.array([1, 0, 1, 1, 1])
    balance, z = (
        (np.concatenate([getattr(encoder, name), getattr(decoder, name)]) * full).sum() / 4
        for name in ("balance_loss", "z_loss")
    )
    np.testing.assert_allclose(loss, 0.5 * balance + 2.0 * z, rtol=1e-5)
    total, count = metrics["router/load"]
    mean = [(figures.load * figures.tokens[:, None]).sum(0) / figures.tokens.sum() for figures in (decoder, encoder)]
    np.testing.assert_allclose(total / count, mean, rtol=1e-5)
    for name in ("dropped", "entropy", "confidence"):
        total, count = metrics[f"router/layer_{name}"]
        rows = [(getattr(layer, name) * layer.tokens).sum() / layer.tokens.sum() for layer in (decoder, encoder)]
        np.testing.assert_allclose(total / count, rows, rtol=1e-5)
        assert metrics[f"router/{name}"][0].ndim == 0
    # Two scanned layers carry one more leading axis and give the same.
    same = jax.tree.map(lambda a, b: np.stack([a, b]), decoder, decoder)
    scanned = generator.router_losses({"statistics": (same,)}, 0.5, 2.0)
    flat = generator.router_losses({"a": (decoder,), "b": (decoder,)}, 0.5, 2.0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), scanned, flat)
    assert generator.router_losses({}, 1.0, 1.0) == (0.0, {})


def test_rows_of_layers_come_in_the_order_of_the_model():
    def layer(load):
        figures = {name: np.ones(1) for name in ("tokens", *generator.ROUTER_METRICS)}
        return RouterStatistics(load=np.array([[load, 1 - load]], np.float32), **figures)

    encoder = {"encoder": {f"layers_{i}": {"mlp": {"statistics": (layer(i / 20),)}} for i in (11, 1, 9)}}
    decoder = {"decoder": {"layers_1": {"mlp": {"statistics": (layer(0.9),)}}}}
    load = generator.router_losses((encoder, decoder), 1.0, 1.0)[1]["router/load"][0]
    np.testing.assert_allclose(load[:, 0], [1 / 20, 9 / 20, 11 / 20, 0.9], rtol=1e-5)


def rows(size):
    rng = np.random.default_rng(2)
    weights = (rng.random((size, 3)) < 0.7).astype(np.float32)
    weights[0], weights[1] = 1, 0  # the second row is padding
    return Batch(decoder_target_tokens=rng.integers(0, 5, (size, 3)), decoder_loss_weights=weights), rng


def test_metrics_count_tokens_and_rows():
    batch, rng = rows(6)
    logits = jax.nn.one_hot(batch.decoder_target_tokens, 5)
    logits = logits.at[2, 0].set(-logits[2, 0])
    losses = rng.random((6, 3))
    weights = batch.decoder_loss_weights
    scalar, metrics = generator.loss_and_metrics(losses, logits, batch, 0.25, {}, None)
    np.testing.assert_allclose(scalar, (losses * weights).sum() / weights.sum() + 0.25, rtol=1e-6)
    wrong = float(weights[2, 0])
    asked = (weights.sum(1) > 0).sum()
    assert metrics["sequence_accuracy"] == (asked - wrong, asked)
    assert metrics["token_accuracy"] == (weights.sum() - wrong, weights.sum())
    assert metrics["loss"][1] == weights.sum()


@pytest.mark.parametrize("factor", [None, 50.0])
def test_micro_batches_equal_one_batch_with_and_without_a_normalizing_factor(factor):
    batch, _ = rows(8)
    params = {"w": jnp.asarray(np.random.default_rng(3).normal(size=(3, 5)), jnp.float32)}

    def objective(params, batch, rng):
        logits = jnp.broadcast_to(params["w"], (batch.size, 3, 5))
        losses = generator.cross_entropy(logits, batch.decoder_target_tokens)
        return generator.loss_and_metrics(losses, logits, batch, 0.1 * (params["w"] ** 2).sum(), {}, factor)

    one, metrics, gradient = step.gradients_of(objective, params, batch, jax.random.key(0), 1)
    four, four_metrics, four_gradient = step.gradients_of(objective, params, batch, jax.random.key(0), 4)
    np.testing.assert_allclose(one, four, rtol=1e-5)
    np.testing.assert_allclose(gradient["w"], four_gradient["w"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], four_metrics["loss"], rtol=1e-5)
    mean = objective(params, batch, None)[0] if factor is None else float(one) * factor
    total, count = metrics["loss"]
    penalty = 0.1 * (params["w"] ** 2).sum()
    np.testing.assert_allclose(mean, total / count + penalty if factor is None else total + penalty * count, rtol=1e-5)


def test_initialiser_touches_every_parameter(tiny):
    """Gradients of the loss reach every leaf: none is left out of training."""
    system = tiny.system({"logits_via_embedding": True})
    params = {k: v for k, v in tiny.initial(system).items() if k != "gate"}
    batch = tiny.batch(4)
    gradients = jax.jit(jax.grad(lambda p: system.evaluation_loss(p, batch)[0]))(params)
    silent = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_flatten_with_path(gradients)[0]
        if not np.abs(leaf).max() > 0
    ]
    assert silent == []
