"""Schedules against their closed forms; optimizers against their definitions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from expertrag_jax.errors import UserError
from expertrag_jax.training import optimizer

STEPS = (0, 1, 5, 10, 11, 40, 1000)
W = 10
CLOSED_FORMS = {
    "constant": lambda t: 0.3,
    "constant * linear_warmup": lambda t: 0.3 * min(1, t / W),
    "constant * linear_warmup * rsqrt_decay": lambda t: 0.3 * min(1, t / W) / math.sqrt(max(t, W)),
    "constant*rsqrt_normalized_decay": lambda t: 0.3 * math.sqrt(W / max(t, W)),
    "linear_decay": lambda t: 0.3 * min(t / W, 1 + 0.02 * (W - t)),
    "constant * decay_every": lambda t: 0.3 * 0.02 ** (t // 7),
    "constant * cosine_decay": lambda t: 0.15 * (1 + math.cos(math.pi * (max(0, (t - W) / 64) % 1))),
}


@pytest.mark.parametrize("factors", CLOSED_FORMS)
def test_factors_equal_their_closed_forms(factors):
    schedule = optimizer.factors_schedule(
        factors, 0.3, warmup_steps=W, decay_factor=0.02, steps_per_decay=7, steps_per_cycle=64
    )
    for t in STEPS:
        assert float(schedule(t)) == pytest.approx(max(1e-8, CLOSED_FORMS[factors](t)), rel=1e-5), t


def test_step_offset_shifts_the_schedule():
    shifted = optimizer.factors_schedule(warmup_steps=W, step_offset=100)
    plain = optimizer.factors_schedule(warmup_steps=W)
    assert float(shifted(125)) == float(plain(25))
    assert float(shifted(50)) == float(plain(0))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("constant * linear",), "'linear' is unknown"),
        (("linear_warmup", 1.0, 0), "warmup_steps of at least 1"),
    ],
)
def test_bad_schedules(arguments, message):
    with pytest.raises(UserError, match=message):
        optimizer.factors_schedule(*arguments)


def test_adafactor_first_step_is_t5s():
    """Step 1 of a full second moment: v = g^2, so u = sign(g); lr * max(eps, rms(p)) * u, no momentum."""
    p = {"w": jnp.array([[3.0, -4.0], [0.0, 5.0]])}
    g = {"w": jnp.array([[1.0, -2.0], [0.5, 3.0]])}
    rule = optimizer.adafactor(0.1)
    updates, state = rule.update(g, rule.init(p), p)
    rms = math.sqrt(float((p["w"] ** 2).mean()))
    np.testing.assert_allclose(updates["w"], -0.1 * rms * jnp.sign(g["w"]), rtol=1e-5)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) <= 4 + 3  # one moment, no momentum


def test_adafactor_second_moment_decays_with_t_to_the_minus_point_8():
    p, rule = {"w": jnp.ones((3,))}, optimizer.adafactor(1.0, multiply_by_parameter_scale=False)
    state = rule.init(p)
    gradients = [jnp.array([1.0, 2.0, 3.0]), jnp.array([2.0, 0.1, -1.0])]
    for g in gradients:
        updates, state = rule.update({"w": g}, state, p)
    decay = 1 - 2**-0.8
    v = decay * gradients[0] ** 2 + (1 - decay) * gradients[1] ** 2
    u = gradients[1] / jnp.sqrt(v)
    u = u / max(1.0, math.sqrt(float((u**2).mean())))
    np.testing.assert_allclose(updates["w"], -u, rtol=1e-5)


def test_adafactor_factors_large_matrices_only():
    p = {"large": jnp.ones((128, 256)), "small": jnp.ones((64, 64))}
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(optimizer.adafactor(0.1).init(p)))
    assert 64 * 64 in sizes and 128 * 256 not in sizes and {128, 256} <= set(sizes)


def test_adafactor_updates_scanned_layers_as_unrolled_ones():
    """Layers of very different size, in two matrices, factored and not, and in a vector; four steps."""
    shapes = {"mlp/wi/kernel": (130, 140), "mlp/wo/kernel": (6, 5), "norm/scale": (7,)}
    keys = jax.random.split(jax.random.key(0), 5)
    numbers = [
        {name: jax.random.normal(key, (*shape, 3)) * jnp.array([0.1, 1.0, 20.0]) for name, shape in shapes.items()}
        for key in keys
    ]
    stacked = [{f"encoder/layers/{name}": jnp.moveaxis(x, -1, 1) for name, x in each.items()} for each in numbers]
    apart = [{f"encoder/layers_{i}/{name}": x[..., i] for i in range(3) for name, x in e.items()} for e in numbers]
    found = []
    for params, *gradients in (stacked, apart):
        rule = optimizer.adafactor(0.1, weight_decay=0.01)
        state, update = rule.init(params), jax.jit(rule.update)
        for g in gradients:
            updates, state = update(g, state, params)
            params = optax.apply_updates(params, updates)
        found.append(params)
    for name in shapes:
        layers = jnp.stack([found[1][f"encoder/layers_{i}/{name}"] for i in range(3)], 1)
        np.testing.assert_allclose(found[0][f"encoder/layers/{name}"], layers, rtol=1e-5, atol=1e-5)


def test_adafactor_of_unrolled_layers_is_optax_s():
    p = {"layers_0/mlp/wi/kernel": jax.random.normal(jax.random.key(1), (130, 140)), "embedding": jnp.zeros((3, 2))}
    ours, theirs = optimizer.adafactor(0.1, weight_decay=0.01), optax.adafactor(0.1, weight_decay_rate=0.01)
    g = jax.tree.map(lambda x: jnp.cos(x) * 3, p)
    (found, state), (expected, other) = (rule.update(g, rule.init(p), p) for rule in (ours, theirs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)
    assert jax.tree.structure(state) == jax.tree.structure(other)


def test_adamw_clips_by_global_norm_and_spares_vectors_from_decay():
    p = {"b": jnp.ones((2,)), "w": jnp.ones((2, 2))}
    zero = jax.tree.map(jnp.zeros_like, p)
    rule = optimizer.adamw(0.1, weight_decay=0.5)
    updates, _ = rule.update(zero, rule.init(p), p)
    np.testing.assert_allclose(updates["w"], -0.05 * np.ones((2, 2)), rtol=1e-6)
    np.testing.assert_array_equal(updates["b"], np.zeros(2))
    scanned = {"encoder/layers/norm/scale": jnp.ones((2, 3)), "encoder/layers/mlp/wi/kernel": jnp.ones((2, 3, 4))}
    updates, _ = rule.update(jax.tree.map(jnp.zeros_like, scanned), rule.init(scanned), scanned)
    assert not updates["encoder/layers/norm/scale"].any() and updates["encoder/layers/mlp/wi/kernel"].all()
    clipped, plain = optimizer.adamw(0.1, eps=1.0, clip_norm=1.0), optimizer.adamw(0.1, eps=1.0)
    g = {"b": jnp.array([3.0, 0.0]), "w": jnp.array([[0.0, 4.0], [0.0, 0.0]])}  # norm 5
    found, _ = clipped.update(g, clipped.init(p), p)
    expected, _ = plain.update(jax.tree.map(lambda x: x / 5, g), plain.init(p), p)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)


def test_the_default_learning_rate_is_t5s_pre_training():
    p = {"w": jnp.full((2, 2), 2.0)}
    rule = optimizer.adafactor()
    updates, state = rule.update(p, rule.init(p), p)
    assert isinstance(rule, optax.GradientTransformation)
    np.testing.assert_allclose(updates["w"], -2.0 / 100 * np.ones((2, 2)), rtol=1e-4)  # for 10,000 steps
    assert float(rule.learning_rate(40_000)) == pytest.approx(1 / 200)


@pytest.mark.parametrize("make", [optimizer.adafactor, optimizer.adamw])
def test_an_optimizer_knows_the_rate_that_it_applies(make):
    """Halving the rate halves the update, at each step of its own count; the state is the plain optimizer's."""
    schedule = optimizer.factors_schedule("constant * linear_warmup", 0.4, warmup_steps=8)
    varying, constant = make(schedule), make(0.1)
    p, g = {"w": jnp.full((2, 2), 2.0)}, {"w": jnp.ones((2, 2))}
    state, plain = varying.init(p), constant.init(p)
    for step in range(4):
        update, state = varying.update(g, state, p)
        reference, plain = constant.update(g, plain, p)
        ratio = varying.learning_rate(jnp.int32(step)) / constant.learning_rate(jnp.int32(step))
        np.testing.assert_allclose(update["w"], ratio * reference["w"], rtol=1e-5, atol=1e-8)
    assert float(constant.learning_rate(7)) == pytest.approx(0.1)
