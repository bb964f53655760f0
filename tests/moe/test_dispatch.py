"""Buckets and combine against the dense oracle, in value and in every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from expertrag_jax.moe import dispatch, routing
from expertrag_jax.moe.experts import expert_feed_forward

GROUPS, SIZE, WIDTH, EXPERTS, HIDDEN = 2, 10, 6, 4, 5


def inputs(activations, seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape, scale=0.7), jnp.float32)

    names = ["wi"] if len(activations) == 1 else ["wi_0", "wi_1"]
    kernels = {name: normal(EXPERTS, WIDTH, HIDDEN) for name in names} | {"wo": normal(EXPERTS, HIDDEN, WIDTH)}
    valid = jnp.asarray(rng.random((GROUPS, SIZE)) < 0.8)
    return normal(GROUPS, SIZE, WIDTH), kernels, normal(WIDTH, EXPERTS), valid, normal(GROUPS, SIZE, WIDTH)


def bucketed(x, kernels, router, valid, k, capacity, activations):
    choice = routing.route(x @ router, valid, k)
    buckets = routing.fill_buckets(choice, EXPERTS, capacity)
    buffers = dispatch.gather_tokens(x, buckets).reshape(GROUPS, EXPERTS, capacity, WIDTH).transpose(1, 0, 2, 3)
    outputs = expert_feed_forward(kernels, buffers.reshape(EXPERTS, -1, WIDTH), activations)
    outputs = outputs.reshape(EXPERTS, GROUPS, capacity, WIDTH).transpose(1, 0, 2, 3)
    return dispatch.combine(outputs.reshape(GROUPS, EXPERTS * capacity, WIDTH), choice.weight, buckets)


def oracle(x, kernels, router, valid, k, capacity, activations):
    """Every expert on every token; the weights of dropped choices are 0."""
    choice = routing.route(x @ router, valid, k)
    buckets = routing.fill_buckets(choice, EXPERTS, capacity)
    weight = jnp.where(buckets.slot < EXPERTS * capacity, choice.weight, 0.0)
    return dispatch.dense_oracle(x, choice.expert_index, weight, kernels, activations)


@pytest.mark.parametrize("activations", [("relu",), ("gelu", "linear")])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("capacity", [SIZE, 2])
def test_buckets_equal_the_dense_oracle(activations, k, capacity):
    x, kernels, router, valid, probe = inputs(activations)
    with_drops = routing.fill_buckets(routing.route(x @ router, valid, k), EXPERTS, capacity).slot
    dropped = (with_drops[valid] == EXPERTS * capacity).any()
    assert dropped == (capacity < SIZE)

    def objective(function):
        def run(x, kernels, router):
            y = function(x, kernels, router, valid, k, capacity, activations)
            return (y * probe).sum(), y

        return jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True))

    (_, y), gradients = objective(bucketed)(x, kernels, router)
    (_, expected), expected_gradients = objective(oracle)(x, kernels, router)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    assert float(jnp.abs(gradients[2]).max()) > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), gradients, expected_gradients)


@pytest.mark.parametrize("k", [1, 2])
def test_no_float_is_scattered_forward_or_backward(k):
    x, kernels, router, valid, probe = inputs(("relu",))

    def objective(x, kernels, router):
        return (bucketed(x, kernels, router, valid, k, 3, ("relu",)) * probe).sum()

    jaxpr = jax.make_jaxpr(jax.grad(objective, argnums=(0, 1, 2)))(x, kernels, router)
    scattered = [e for e in equations(jaxpr.jaxpr) if e.primitive.name.startswith("scatter")]
    assert scattered  # the slots' integers are
    assert all(jnp.issubdtype(e.invars[0].aval.dtype, jnp.integer) for e in scattered)
    # The check can fail: JAX's own derivative of the same gather scatters floats.
    plain = jax.make_jaxpr(jax.grad(lambda x: (x[jnp.array([1, 1])] ** 2).sum()))(x[0])
    assert any("scatter" in e.primitive.name for e in equations(plain.jaxpr))


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
            if hasattr(value, "jaxpr"):
                value = value.jaxpr
            if hasattr(value, "eqns"):
                yield from equations(value)
