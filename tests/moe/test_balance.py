"""The bias of loss-free balancing: its gradient, and that any optimizer evens out the load with it."""

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
from expertrag_jax.training.optimizer import adafactor

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
def test_the_gradient_is_the_sign_of_the_load_whatever_the_loss(scale):
    params, x, valid = example()
    gradient, figures = gradients(params, x, valid, scale)
    index = np.argmax(np.asarray(x @ params["router"]["router_weights"]["w"]["kernel"]), -1)
    load = np.bincount(index[np.asarray(valid)], minlength=EXPERTS) / np.asarray(valid).sum()
    np.testing.assert_allclose(balance.load_error(figures), load - 1 / EXPERTS, atol=1e-6)
    np.testing.assert_allclose(gradient["selection_bias"], balance.RATE * np.sign(load - 1 / EXPERTS))
    assert float(jnp.abs(gradient["router"]["router_weights"]["w"]["kernel"]).max()) > 1e-3


def test_a_mesh_gives_the_same_gradient():
    params, x, valid = example()
    expected, _ = gradients(params, x, valid)
    with jax.set_mesh(partitioning.make_mesh(partitioning.MeshConfig(data=2, expert=4))):
        sharded, _ = gradients(params, x, valid)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), sharded, expected)


OPTIMIZERS = {
    "adafactor": adafactor(0.02),
    "adam": optax.adam(0.02),
    "sgd": optax.sgd(20.0),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_even_out_the_load(name):
    params, x, valid = example()
    optimizer = OPTIMIZERS[name]

    @jax.jit
    def run(params):
        def step(carry, _):
            bias, state = carry
            gradient, figures = gradients(params | {"selection_bias": bias}, x, valid)
            updates, state = optimizer.update({"b": gradient["selection_bias"]}, state, {"b": bias})
            return (optax.apply_updates({"b": bias}, updates)["b"], state), jnp.abs(balance.load_error(figures)).max()

        bias = params["selection_bias"]
        return jax.lax.scan(step, (bias, optimizer.init({"b": bias})), length=40)[1]

    errors = np.asarray(run(params))
    assert errors[0] > 0.3 and errors[-10:].mean() < 0.1, errors
