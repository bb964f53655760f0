"""The bias of loss-free balancing: its gradient, the step that training takes with it, and what it does to the load."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from expertrag_jax import partitioning
from expertrag_jax.moe import balance
from expertrag_jax.moe.layer import MixtureOfExperts
from expertrag_jax.training import parameters
from expertrag_jax.training.optimizer import adafactor, adamw
from expertrag_jax.training.state import TrainState
from expertrag_jax.training.step import make_train_step

WIDTH, EXPERTS = 6, 4
LAYER = MixtureOfExperts(EXPERTS, hidden=4, group_size=16, loss_free_balancing=True)


def example():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(8, 16, WIDTH)), jnp.float32).at[..., 0].set(1.0)
    valid = jnp.asarray(rng.random((8, 16)) < 0.9)
    params = nn.unbox(LAYER.init(jax.random.key(0), x, valid, True))["params"]
    kernel = jnp.asarray(0.3 * rng.normal(size=(WIDTH, EXPERTS)), jnp.float32).at[0, 2].add(1.0)
    params["router"]["router_weights"]["w"]["kernel"] = kernel  # expert 2 is everybody's first
    return params, x, valid


@functools.partial(jax.jit, static_argnames="scale")
def gradients(params, x, valid, scale=1.0):
    def objective(params):
        y, state = LAYER.apply({"params": params}, x, valid, False, mutable=["router"])
        return scale * (y**2).sum(), state["router"]["statistics"][0]

    return jax.grad(objective, has_aux=True)(params)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_the_gradient_is_the_error_of_the_load_whatever_the_loss(scale):
    params, x, valid = example()
    gradient, figures = gradients(params, x, valid, scale)
    index = np.argmax(np.asarray(x @ params["router"]["router_weights"]["w"]["kernel"]), -1)
    load = np.bincount(index[np.asarray(valid)], minlength=EXPERTS) / np.asarray(valid).sum()
    np.testing.assert_allclose(balance.load_error(figures), load - 1 / EXPERTS, atol=1e-6)
    np.testing.assert_allclose(gradient["selection_bias"], load - 1 / EXPERTS, atol=1e-6)
    assert float(jnp.abs(gradient["router"]["router_weights"]["w"]["kernel"]).max()) > 1e-3


def test_a_mesh_gives_the_same_gradient():
    params, x, valid = example()
    expected, _ = gradients(params, x, valid)
    with jax.set_mesh(partitioning.make_mesh(partitioning.MeshConfig(data=2, expert=4))):
        sharded, _ = gradients(params, x, valid)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), sharded, expected)


OPTIMIZERS = {"adafactor": adafactor(0.02), "adamw": adamw(0.02, weight_decay=0.1), "sgd": optax.sgd(20.0)}


@pytest.mark.parametrize("name, microbatches", [*((name, 1) for name in OPTIMIZERS), ("adafactor", 2)])
def test_a_training_step_moves_the_bias_by_u_whatever_the_optimizer(name, microbatches):
    params, x, valid = example()

    def loss(params, batch, rng):
        y, state = LAYER.apply({"params": params}, batch["x"], batch["valid"], False, mutable=["router"])
        scalar = (y**2).mean()
        return scalar, {"loss": (scalar, jnp.ones(()))}

    valid = jnp.ones_like(valid)
    optimizer, zero = OPTIMIZERS[name], jnp.zeros((), jnp.int32)
    state = TrainState(zero, zero, zero, params, optimizer.init(parameters.flatten(params)))
    gradient, _ = gradients(params, x, valid)
    step = make_train_step(loss, optimizer, microbatches=microbatches, donate=False)
    after, metrics = step(state, {"x": x, "valid": valid})
    moved = after.params["selection_bias"] - params["selection_bias"]
    np.testing.assert_array_equal(moved, -balance.RATE * np.sign(gradient["selection_bias"]))
    assert np.abs(moved).max() == np.float32(balance.RATE)
    others = [g for name, g in parameters.flatten(gradients(params, x, valid)[0]).items() if name != "selection_bias"]
    if microbatches == 1:  # the mean over 8 * 16 * 6 numbers, in place of their sum
        norm = optax.global_norm(others) / x.size
        np.testing.assert_allclose(metrics["gradient_norm"][0], norm, rtol=1e-4)


def test_the_load_of_64_experts_evens_out():
    """Tokens that prefer few experts: the bias spreads them, in steps of u."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4096, 64)) + np.linspace(1.5, 0, 64)
    scores = jax.nn.softmax(jnp.asarray(logits, jnp.float32))

    @jax.jit
    def after(bias):
        load = jnp.bincount((scores + bias).argmax(-1), length=64) / len(scores)
        error = load - load.mean()
        zeroed, errors = balance.take_errors({"mlp/selection_bias": error})
        return bias + balance.with_bias_steps(zeroed, errors)["mlp/selection_bias"], jnp.abs(error).max() * 64

    bias, errors = jnp.zeros(64), []
    for _ in range(60):
        bias, error = after(bias)
        errors.append(float(error))
    assert errors[0] > 1.5 and np.mean(errors[-10:]) < 0.4, errors
