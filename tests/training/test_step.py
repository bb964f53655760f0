"""The train step against plain JAX."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from expertrag_jax import partitioning
from expertrag_jax.errors import UserError
from expertrag_jax.systems.system import Phase
from expertrag_jax.training import phases, step
from expertrag_jax.training.state import Layout


@pytest.fixture
def layout(toy):
    return Layout(toy.Toy(), partitioning.make_mesh(devices=jax.devices()[:1]))


def fresh(layout, toy, phase):
    return phases.enter(layout.initial_params(toy.Toy(), 0), 0, 0, phase, layout)


def without_rng(toy):
    return lambda params, batch, rng: toy.loss(params, batch, None)


def test_micro_batches_equal_one_big_batch(toy, layout):
    batch = toy.rows(3, 16)
    batch["weight"][1::4] = 0  # micro-batch 1 of 4 has no unit at all: its own mean is 0 / 0
    phase = Phase("p", 1, without_rng(toy), optax.sgd(0.1))
    results = []
    for microbatches in (1, 4):
        train_step = step.make_train_step(phase.loss, phase.make_optimizer(), microbatches=microbatches)
        results.append(train_step(fresh(layout, toy, phase), batch))
    (one, one_metrics), (four, four_metrics) = results
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one.params, four.params)
    for name in ("loss", "objective", "gradient_norm"):
        total, count = one_metrics[name]
        np.testing.assert_allclose(total / count, four_metrics[name][0] / four_metrics[name][1], rtol=1e-5)
    assert float(four_metrics["loss"][1]) == batch["weight"].sum()


def test_micro_batches_lower_the_memory_in_proportion(toy):
    """What does not shrink is as large as parameters and batch, and here both are small beside the activations."""
    system, batch = toy.Toy(width=512), toy.rows(3, 1024)
    layout = Layout(system, partitioning.make_mesh(devices=jax.devices()[:1]))
    phase = Phase("p", 1, toy.loss, optax.sgd(0.1))
    temporary = {}
    for microbatches in (1, 4, 16):
        train_step = step.make_train_step(phase.loss, phase.make_optimizer(), microbatches=microbatches)
        compiled = train_step.lower(layout.abstract_state(phase), batch).compile()
        temporary[microbatches] = compiled.memory_analysis().temp_size_in_bytes
    assert temporary[16] < 0.3 * temporary[4] and temporary[4] < 0.5 * temporary[1]


def test_micro_batches_gather_split_parameters_where_they_are_used(toy):
    """Ahead of the loop over micro-batches they would all be there at once."""
    mesh = partitioning.make_mesh(partitioning.MeshConfig(data=1, fsdp=2), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        phase, batch = Phase("p", 1, toy.loss, optax.sgd(0.1)), toy.rows(3, 16)
        state = Layout(toy.Toy(), mesh).abstract_state(phase)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        train_step = step.make_train_step(
            phase.loss, phase.make_optimizer(), microbatches=4, state_shardings=shardings
        )
        text = train_step.lower(state, partitioning.global_batch(batch, mesh)).compile().as_text()
    gathers = [line for line in text.splitlines() if re.search(r"= f32\[[\d,]+\]\S* all-gather\(", line)]
    assert gathers and not [line for line in gathers if line in text[text.index("\nENTRY") :]]


def test_gradient_and_update_are_plain_jax(toy, layout):
    batch, phase = toy.rows(3, 16), Phase("p", 1, without_rng(toy), optax.sgd(0.1))
    state = fresh(layout, toy, phase)
    before = jax.device_get(state.params)
    gradient = jax.grad(lambda p: toy.loss(p, batch, None)[0])(before)
    after, metrics = step.make_train_step(phase.loss, phase.make_optimizer())(state, batch)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, before, gradient)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), after.params, expected)
    norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(gradient)))
    assert float(metrics["gradient_norm"][0]) == pytest.approx(norm, rel=1e-5)
    assert float(metrics["update_norm"][0]) == pytest.approx(0.1 * norm, rel=1e-5)
    assert (int(after.step), int(after.phase_step)) == (1, 1)


def test_frozen_parameters_stay_and_have_no_gradient_and_no_optimizer_state(toy, layout):
    seen = []

    def loss(params, batch, rng):
        seen.append([type(x).__name__ for x in (params["body"]["kernel"], params["head"]["kernel"])])
        return toy.loss(params, batch, None)

    phase = Phase("p", 1, loss, optax.adam(0.1), ("head/.*",))
    state = fresh(layout, toy, phase)
    before = jax.device_get(state.params)
    assert {leaf.shape for leaf in jax.tree.leaves(state.optimizer_state)} == {(), (8, 8)}
    train_step = step.make_train_step(phase.loss, phase.make_optimizer(), phase.trainable)
    for position in range(3):
        state, _ = train_step(state, toy.rows(position, 8))
    np.testing.assert_array_equal(state.params["body"]["kernel"], before["body"]["kernel"])
    assert not np.array_equal(state.params["head"]["kernel"], before["head"]["kernel"])
    assert seen[0][0] != seen[0][1]  # only the head is traced for differentiation


def test_a_step_that_is_not_finite_changes_nothing(toy, layout):
    phase = Phase("p", 1, without_rng(toy), optax.adam(0.1))
    state = fresh(layout, toy, phase)
    before = jax.device_get(state)
    batch = toy.rows(0, 8)
    batch["x"][0, 0] = np.nan
    after, metrics = step.make_train_step(phase.loss, phase.make_optimizer())(state, batch)
    assert float(metrics["finite"][0]) == 0
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(after))


def test_random_numbers_differ_by_step_micro_batch_and_seed(toy, layout):
    def loss(params, batch, rng):
        value = jax.random.uniform(rng)
        return value + 0 * params["head"]["kernel"].sum(), {"loss": (value, jnp.ones(()))}

    def run(seed, microbatches):
        phase = Phase("p", 1, loss, optax.sgd(0.1))
        state = fresh(layout, toy, phase)
        train_step = step.make_train_step(loss, phase.make_optimizer(), microbatches=microbatches, seed=seed)
        values = []
        for _ in range(2):
            state, metrics = train_step(state, toy.rows(0, 8))
            values.append(float(metrics["loss"][0]))
        return values

    one, two, other = run(0, 1), run(0, 2), run(1, 1)
    assert len({*one, *other}) == 4
    assert two[0] != pytest.approx(2 * one[0])


def test_a_batch_that_does_not_split_is_an_error(toy, layout):
    phase = Phase("p", 1, without_rng(toy), optax.sgd(0.1))
    train_step = step.make_train_step(phase.loss, phase.make_optimizer(), microbatches=3)
    with pytest.raises(UserError, match="batch of 16 does not split into 3 micro-batches"):
        train_step(fresh(layout, toy, phase), toy.rows(0, 16))


def test_split_batch_gives_every_row_once_and_strided():
    parts = step.split_batch({"x": np.arange(12).reshape(12, 1)}, 3)["x"]
    np.testing.assert_array_equal(parts[1, :, 0], [1, 4, 7, 10])
    assert sorted(np.asarray(parts).ravel()) == list(range(12))
