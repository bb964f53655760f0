"""Every way through the experts against the dense oracle, in value and in every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from expertrag_jax.moe import dispatch, mixture, routing

GROUPS, SIZE, WIDTH, EXPERTS, HIDDEN = 2, 36, 6, 4, 5
ACTIVATIONS = ("gelu", "linear")


def inputs(dtype="float32", seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape, scale=0.7), dtype).astype(jnp.float32)  # what dtype can hold

    kernels = {name: normal(EXPERTS, WIDTH, HIDDEN) for name in ("wi_0", "wi_1")} | {
        "wo": normal(EXPERTS, HIDDEN, WIDTH)
    }
    router = normal(WIDTH, EXPERTS).at[:, 1].multiply(3.0)  # an uneven load: more than one block
    valid = jnp.asarray(rng.random((GROUPS, SIZE)) < 0.8)
    return normal(GROUPS, SIZE, WIDTH), kernels, router, valid, normal(GROUPS, SIZE, WIDTH)


def oracle(x, router_input, valid, router, kernels, *, k, activations):
    choice = routing.route(router.logits(router_input), valid, k)
    return dispatch.dense_oracle(x, choice.expert_index, choice.weight, kernels, activations)


WAYS = {
    "buckets": functools.partial(mixture.buckets, capacity=SIZE, exact=False, prioritised=False),
    "prioritised": functools.partial(mixture.buckets, capacity=SIZE, exact=False, prioritised=True),
    "exact": functools.partial(mixture.buckets, capacity=3, exact=True, prioritised=False),
    "dropless": mixture.dropless,
}


CASES = [(way, k, "float32") for way in ("buckets", "dropless") for k in (1, 2)]
CASES += [
    ("prioritised", 2, "float32"),
    ("exact", 2, "float32"),
    ("buckets", 2, "bfloat16"),
    ("dropless", 2, "bfloat16"),
]


@pytest.mark.parametrize("way,k,dtype", CASES)
def test_equals_the_dense_oracle_where_nothing_is_dropped(way, k, dtype):
    x, kernels, router, valid, probe = inputs(dtype)

    def objective(function):
        def run(x, kernels, router):
            rows = x.astype(dtype)
            y = function(rows, rows, valid, mixture.Router(router), kernels, k=k, activations=ACTIVATIONS)
            y = (y[0] if isinstance(y, tuple) else y).astype(jnp.float32)
            return (y * probe).sum(), y

        return jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True))

    (_, y), gradients = objective(WAYS[way])(x, kernels, router)
    (_, expected), expected_gradients = objective(oracle)(x, kernels, router)
    bound = 1e-5 if dtype == "float32" else 2e-2

    def close(a, b):  # relative to the array's largest value
        np.testing.assert_allclose(a, b, rtol=bound, atol=bound * max(1.0, float(jnp.abs(b).max())))

    close(y, expected)
    assert all(float(jnp.abs(leaf).max()) > 1e-3 for leaf in jax.tree.leaves(gradients))
    jax.tree.map(close, gradients, expected_gradients)
    assert not np.asarray(y)[~np.asarray(valid)].any()


@pytest.mark.parametrize("way", ["buckets", "expert_choice"])
def test_the_router_works_in_float32_under_bfloat16(way):
    x, kernels, router, valid, _ = inputs("bfloat16")
    run = WAYS.get(way) or functools.partial(mixture.expert_choice, capacity_factor=1.0)
    run = jax.jit(functools.partial(run, k=2, activations=ACTIVATIONS))
    wide = run(x, x, valid, mixture.Router(router), kernels)[1]
    narrow = run(x.astype("bfloat16"), x.astype("bfloat16"), valid, mixture.Router(router), kernels)[1]
    jax.tree.map(np.testing.assert_array_equal, narrow, wide)
    rounded = run(x, x, valid, mixture.Router(router.astype("bfloat16") * 1.01), kernels)[1]
    assert float(jnp.abs(rounded.entropy - wide.entropy).max()) > 1e-4  # such a router would have shown


def brute_force_expert_choice(x, valid, router, kernels, k, factor):
    """Zhou et al. by loops: per group and expert, the likeliest tokens; y = sum of weight times expert's output."""
    y, readers = np.zeros(x.shape), np.zeros(valid.shape, int)
    for group in range(x.shape[0]):
        logits = x[group] @ router
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        tokens = [t for t in range(x.shape[1]) if valid[group, t]]
        room = int(np.ceil(factor * k * len(tokens) / EXPERTS))
        for e in range(EXPERTS):
            for t in sorted(tokens, key=lambda t: -p[t, e])[:room]:
                row = x[group, t]
                hidden = np.asarray(jax.nn.gelu(row @ kernels["wi_0"][e])) * (row @ kernels["wi_1"][e])
                y[group, t] += p[t, e] * (hidden @ kernels["wo"][e])
                readers[group, t] += 1
    return y, readers


@pytest.mark.parametrize("k,factor", [(1, 1.0), (2, 1.25)])
def test_expert_choice_is_that_of_the_loops(k, factor):
    x, kernels, router, valid, _ = inputs()
    run = functools.partial(mixture.expert_choice, k=k, capacity_factor=factor, activations=ACTIVATIONS)
    y, figures = jax.jit(run)(x, x, valid, mixture.Router(router), kernels)
    arrays = [np.asarray(each, np.float64) for each in (x, router)]
    plain = {name: np.asarray(kernel, np.float64) for name, kernel in kernels.items()}
    expected, readers = brute_force_expert_choice(arrays[0], np.asarray(valid), arrays[1], plain, k, factor)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    unread = ((readers == 0) & np.asarray(valid)).sum(1) / np.asarray(valid).sum(1)
    assert readers.max() > 1 and (unread.any() or k == 2)
    np.testing.assert_allclose(figures.dropped, unread, rtol=1e-5)
    np.testing.assert_allclose(figures.load, 1 / EXPERTS, rtol=1e-6)
    np.testing.assert_allclose(figures.balance_loss, 1.0, rtol=1e-5)


def test_expert_choice_does_not_depend_on_the_padding_behind():
    x, kernels, router, _, _ = inputs()
    run = jax.jit(functools.partial(mixture.expert_choice, k=1, capacity_factor=1.25, activations=ACTIVATIONS))
    short, long = x[:, :11], x.at[:, 11:].set(9.0)
    alone = run(short, short, jnp.ones((GROUPS, 11), bool), mixture.Router(router), kernels)[0]
    padded = run(long, long, jnp.broadcast_to(jnp.arange(SIZE) < 11, (GROUPS, SIZE)), mixture.Router(router), kernels)[
        0
    ]
    np.testing.assert_allclose(padded[:, :11], alone, rtol=1e-5, atol=1e-6)
    assert not padded[:, 11:].any()
