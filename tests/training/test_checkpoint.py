"""Checkpoints: what goes in comes out, whole, on any layout, or a clear message."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from expertrag_jax import partitioning
from expertrag_jax.errors import UserError
from expertrag_jax.training import phases, step
from expertrag_jax.training.checkpoint import Checkpoints
from expertrag_jax.training.state import Layout


@pytest.fixture
def mesh():
    return partitioning.make_mesh(devices=jax.devices()[:1])


def entered(toy, mesh, width=8, phase=0):
    system = toy.Toy(width)
    layout = Layout(system, mesh)
    chosen = system.phases[phase]
    return layout, chosen, phases.enter(layout.initial_params(system, 0), 7, phase, chosen, layout)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_state_comes_back_although_its_memory_is_reused_at_once(toy, mesh, tmp_path, asynchronous):
    layout, phase, state = entered(toy, mesh)
    train_step = step.make_train_step(phase.loss, phase.make_optimizer())
    state, _ = train_step(state, toy.rows(0, 8))
    expected = jax.tree.map(lambda x: np.array(x, copy=True), state)
    with Checkpoints(tmp_path, asynchronous=asynchronous) as checkpoints:
        checkpoints.save(8, state, {"phase": "body"})
        for position in range(5):
            state, _ = train_step(state, toy.rows(position, 8))  # donates the memory of what is being written
        checkpoints.wait()
        assert checkpoints.metadata(8)["phase"] == "body"
        restored = checkpoints.restore(8, layout.abstract_state(phase))
    jax.tree.map(np.testing.assert_array_equal, expected, restored)
    assert jax.tree.structure(expected) == jax.tree.structure(restored)
    with pytest.raises(AssertionError):  # the comparison can fail
        jax.tree.map(np.testing.assert_array_equal, expected, state)


def test_the_newest_stay(toy, mesh, tmp_path):
    _, _, state = entered(toy, mesh)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for number in (1, 2, 3, 3):
            checkpoints.save(number, state, {})
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest == 3
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == ["2", "3"]


def test_what_a_killed_run_left_half_written_is_no_checkpoint(toy, mesh, tmp_path):
    _, _, state = entered(toy, mesh)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, state, {})
    (tmp_path / "9.orbax-checkpoint-tmp-123").mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest == 5


def test_another_shape_is_refused_with_names_and_both_shapes(toy, mesh, tmp_path):
    _, _, state = entered(toy, mesh)
    other, phase, _ = entered(toy, mesh, width=16)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, state, {})
        checkpoints.wait()
        with pytest.raises(UserError) as error:
            checkpoints.restore(5, other.abstract_state(phase))
    message = str(error.value)
    assert "body/kernel is (4, 8) in the checkpoint and (4, 16) in the model" in message
    assert "more; use the configuration" in message


def test_another_optimizer_is_refused(toy, mesh, tmp_path):
    layout, _, state = entered(toy, mesh)
    head = toy.Toy().phases[1]
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, state, {})
        checkpoints.wait()
        with pytest.raises(UserError, match="optimizer_state/0/mu/head/kernel is absent in the checkpoint"):
            checkpoints.restore(5, layout.abstract_state(head))


def test_a_phase_gets_a_new_optimizer_state_for_its_trainable_parameters(toy, mesh):
    _, _, state = entered(toy, mesh, phase=1)
    assert (int(state.step), int(state.phase), int(state.phase_step)) == (7, 1, 0)
    names = {
        jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.optimizer_state)
    }
    assert not any("body" in name for name in names) and any("head/kernel" in name for name in names)
    assert all(not jnp.any(leaf) for leaf in jax.tree.leaves(state.optimizer_state))
