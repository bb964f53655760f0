"""The sparse layer: nothing dropped in evaluation, and the mesh's collectives."""

import functools
import re

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


@functools.partial(jax.jit, static_argnames="layer")
def loss_and_gradients(params, x, valid, layer=LAYER):
    """A loss of outputs and router losses, its figures, and its gradients to parameters and inputs."""

    def objective(params, x):
        y, state = layer.apply({"params": params}, x, valid, False, mutable=["router"])
        figures = state["router"]["statistics"][0]
        return (jnp.sin(y) * x).sum() + figures.balance_loss.mean() + figures.z_loss.mean(), figures

    return jax.value_and_grad(objective, (0, 1), has_aux=True)(params, x)


def layer_of(experts, dispatch):
    if dispatch == "expert_choice":
        return LAYER.clone(num_experts=experts, routing="expert_choice")
    return LAYER.clone(num_experts=experts, dispatch=dispatch)


@functools.cache
def on_one_device(experts, dispatch):
    layer = layer_of(experts, dispatch)
    params = parameters(layer)
    return params, loss_and_gradients(params, *tokens(8, 8), layer=layer)


PLACES = [
    ({"expert": 8}, 8, "buckets"),
    ({"expert": 8}, 64, "buckets"),
    ({"expert": 4}, 8, "buckets"),
    ({"data": 2, "expert": 4}, 8, "buckets"),
    ({"data": 2, "expert": 2, "tensor": 2}, 8, "buckets"),
    ({"fsdp": 8}, 8, "buckets"),
    ({"data": 2, "expert": 4}, 8, "dropless"),
    ({"data": 2, "expert": 2, "tensor": 2}, 8, "dropless"),
    ({"data": 2, "expert": 4}, 8, "expert_choice"),
]


def mesh_of(axes):
    config = partitioning.MeshConfig(**{"data": 1} | axes)
    return partitioning.make_mesh(config, jax.devices()[: int(np.prod(list(axes.values())))])


@pytest.mark.parametrize("axes,experts,dispatch", PLACES, ids=str)
def test_loss_and_gradients_are_those_of_one_device(axes, experts, dispatch):
    params, expected = on_one_device(experts, dispatch)
    mesh = mesh_of(axes)
    with jax.set_mesh(mesh):
        batch = jax.device_put(tokens(8, 8), partitioning.batch_sharding(mesh))
        sharded = loss_and_gradients(params, *batch, layer=layer_of(experts, dispatch))
    figures = expected[0][1]
    assert bool(figures.dropped.any()) == (dispatch != "dropless")  # where capacity binds, the groups are the same
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), sharded, expected)


def collectives(program, name):
    """Replica groups of each collective of this name in a compiled program."""
    lines = [line for line in program.splitlines() if f" {name}(" in line or f" {name}-start(" in line]
    groups = [re.search(r"replica_groups=(\{\{.*?\}\}|\[.*?\]<=\[[^,]*?\][^,]*)", line).group(1) for line in lines]
    return [group.replace(" ", "") for group in groups]


EXCHANGES = {  # mesh, replica groups of the two exchanges, and of the sum over tensor
    "expert=8": ({"expert": 8}, "{{0,1,2,3,4,5,6,7}}", None),
    "data=2 expert=4": ({"data": 2, "expert": 4}, "{{0,1,2,3},{4,5,6,7}}", None),
    "data=2 expert=2 tensor=2": (
        {"data": 2, "expert": 2, "tensor": 2}, "{{0,2},{1,3},{4,6},{5,7}}", "{{0,1},{2,3},{4,5},{6,7}}"
    ),
    "fsdp=8": ({"fsdp": 8}, None, None),
}  # fmt: skip


@pytest.mark.parametrize("place", EXCHANGES)
def test_a_forward_pass_exchanges_twice_and_gathers_nothing(place, optimised):
    axes, exchanged, summed = EXCHANGES[place]
    mesh = mesh_of(axes)
    with jax.set_mesh(mesh):
        rows = partitioning.batch_sharding(mesh)
        batch = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=rows) for a in tokens(8, 8)]
        layer = LAYER.clone(k=2)  # top_k is what the compiler would gather for
        program = jax.jit(lambda p, x, v: apply(p, x, v, False, layer)).lower(parameters(), *batch).compile().as_text()
    assert collectives(program, "all-to-all") == ([exchanged] * 2 if exchanged else [])
    assert collectives(program, "all-reduce") == ([summed] if summed else [])
    for name in ("all-gather", "reduce-scatter", "collective-permute"):
        assert collectives(program, name) == []


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


def test_chosen_tokens_of_a_row_do_not_depend_on_its_batch_mates():
    layer = LAYER.clone(routing="expert_choice", group_size=32)  # a row is 8 tokens
    params, (x, valid) = parameters(), tokens()
    alone = apply(params, x[1:2], valid[1:2], layer=layer)[0]
    np.testing.assert_allclose(apply(params, x, valid, layer=layer)[0][1:2], alone, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(apply(params, x, valid, False, layer=layer)[0][1:2], alone, rtol=1e-5, atol=1e-6)


def test_what_does_not_divide_is_an_error():
    x, valid = tokens(8, 8)
    with jax.set_mesh(partitioning.make_mesh(partitioning.MeshConfig(data=1, expert=8))):
        six = MixtureOfExperts(6, hidden=4, group_size=8)
        with pytest.raises(UserError, match="6 experts do not divide over the mesh axis expert=8"):
            jax.eval_shape(lambda: six.init(jax.random.key(0), x, valid, False))
        big = MixtureOfExperts(8, hidden=4, group_size=64)
        with pytest.raises(UserError, match="64 tokens in routing groups of 64 make 1 groups"):
            jax.eval_shape(lambda: big.init(jax.random.key(0), x, valid, False))
