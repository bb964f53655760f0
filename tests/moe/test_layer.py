"""The sparse layer: nothing dropped in evaluation, and the mesh's collectives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from expertrag_jax import partitioning
from expertrag_jax.errors import UserError
from expertrag_jax.moe import dispatch, routing
from expertrag_jax.moe.layer import MixtureOfExperts

WIDTH, EXPERTS = 6, 8
LAYER = MixtureOfExperts(EXPERTS, hidden=4, group_size=8, train_capacity_factor=1.0)


def tokens(batch=4, length=8, seed=0):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(batch, length, WIDTH)), jnp.float32)
    return x, jnp.asarray(rng.random((batch, length)) < 0.9)


def parameters(layer=LAYER, overloaded=False):
    shapes = nn.unbox(jax.eval_shape(lambda: layer.init(jax.random.key(0), *tokens(), True))["params"])
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape), jnp.float32), shapes)
    if overloaded:  # every token wants expert 3
        kernel = jnp.zeros((WIDTH, EXPERTS)).at[0, 3].set(1e-3)
        params["router"]["router_weights"]["w"]["kernel"] = kernel
    return params


@functools.partial(jax.jit, static_argnames=("deterministic", "layer"))
def apply(params, x, valid, deterministic=True, layer=LAYER):
    y, state = layer.apply({"params": params}, x, valid, deterministic, mutable=["router"])
    return y, state["router"]["statistics"][0]


@jax.jit
def oracle(params, x, valid):
    router = params["router"]["router_weights"]["w"]["kernel"]
    choice = routing.route(x @ router, valid, 1)
    kernels = {name: leaf["kernel"] for name, leaf in params["expert"].items()}
    return dispatch.dense_oracle(x, choice.expert_index, choice.weight, kernels, LAYER.activations)


@pytest.mark.parametrize("overloaded", [False, True])
def test_evaluation_drops_nothing(overloaded):
    params, (x, valid) = parameters(overloaded=overloaded), tokens()
    x = x.at[..., 0].set(jnp.abs(x[..., 0]))
    y, figures = apply(params, x, valid)
    np.testing.assert_allclose(y, oracle(params, x, valid), rtol=1e-5, atol=1e-6)
    assert not figures.dropped.any()
    if overloaded:  # the fast path alone would have dropped, as training does
        trained, figures = apply(params, x, valid, False)
        assert figures.dropped.min() > 0.5
        assert float(jnp.abs(trained - y).max()) > 1e-3
        limited = MixtureOfExperts(EXPERTS, hidden=4, group_size=8, eval_capacity_factor=1.0)
        assert apply(params, x, valid, layer=limited)[1].dropped.min() > 0.5


def test_a_row_does_not_depend_on_its_batch_mates():
    params, (x, valid) = parameters(), tokens()
    alone = apply(params, x[1:2], valid[1:2])[0]
    crowd = jnp.tile(x[2:3], (4, 1, 1)).at[1].set(x[1])  # all others want the same experts
    together = apply(params, crowd, jnp.tile(valid[1:2], (4, 1)))[0][1:2]
    np.testing.assert_allclose(alone, together, rtol=1e-5, atol=1e-6)


def test_jitter_only_moves_the_router_and_only_in_training():
    layer = MixtureOfExperts(EXPERTS, hidden=4, group_size=8, jitter=0.5)
    params, (x, valid) = parameters(), tokens()
    assert float(jnp.abs(apply(params, x, valid, layer=layer)[0] - apply(params, x, valid)[0]).max()) == 0
    run = jax.jit(lambda key: layer.apply({"params": params}, x, valid, False, rngs={"jitter": key}))
    assert float(jnp.abs(run(jax.random.key(0)) - run(jax.random.key(1))).max()) > 1e-4


MESHES = [{"expert": 8}, {"data": 2, "expert": 4}, {"data": 2, "tensor": 4}, {"fsdp": 8}]


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_two_exchanges_per_layer_and_the_values_of_one_device(axes):
    x, valid = tokens(8, 8)
    params = parameters()
    expected, figures = apply(params, x, valid, False)
    mesh = partitioning.make_mesh(partitioning.MeshConfig(**{"data": 1} | axes))
    with jax.set_mesh(mesh):
        rows = partitioning.batch_sharding(mesh)
        compiled = jax.jit(lambda p, x, v: apply(p, x, v, False)).lower(
            params, *(jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=rows) for a in (x, valid))
        )
        compiled = compiled.compile()
        y, sharded_figures = compiled(params, jax.device_put(x, rows), jax.device_put(valid, rows))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), figures, sharded_figures)
    program = compiled.as_text()
    assert program.count(" all-to-all(") == (2 if axes.get("expert") else 0)
    assert program.count(" all-reduce(") == (1 if axes.get("tensor") else 0)


def test_exact_path_on_a_mesh():
    params, (x, valid) = parameters(overloaded=True), tokens(8, 8)
    x = x.at[..., 0].set(jnp.abs(x[..., 0]))
    expected = oracle(params, x, valid)
    with jax.set_mesh(partitioning.make_mesh(partitioning.MeshConfig(data=2, expert=4))):
        y, figures = apply(params, x, valid)
        odd, _ = apply(params, x[:3], valid[:3])  # 3 rows over 8 shards: not sharded by hand
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(odd, expected[:3], rtol=1e-5, atol=1e-6)
    assert not figures.dropped.any()


def test_what_does_not_divide_is_an_error():
    x, valid = tokens(8, 8)
    with jax.set_mesh(partitioning.make_mesh(partitioning.MeshConfig(data=1, expert=8))):
        six = MixtureOfExperts(6, hidden=4, group_size=8)
        with pytest.raises(UserError, match="6 experts do not divide over the mesh axis expert=8"):
            jax.eval_shape(lambda: six.init(jax.random.key(0), x, valid, False))
        big = MixtureOfExperts(8, hidden=4, group_size=64)
        with pytest.raises(UserError, match="64 tokens in routing groups of 64 make 1 groups"):
            jax.eval_shape(lambda: big.init(jax.random.key(0), x, valid, False))
