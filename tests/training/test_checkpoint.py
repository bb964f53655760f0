"""Checkpoints: what goes in comes out, whole, on any layout, or a clear message."""

import logging
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from expertrag_jax import partitioning
from expertrag_jax.errors import UserError
from expertrag_jax.training import checkpoint, loop, phases, pretrained, step
from expertrag_jax.training.checkpoint import Checkpoints, Damaged
from expertrag_jax.training.retention import Retention
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


def test_what_a_killed_run_left_half_written_is_removed_with_a_warning(toy, mesh, tmp_path, caplog, told):
    _, _, state = entered(toy, mesh)
    cut_off = "the checkpoint at step {} was cut off while it was written: removed, {}"
    (tmp_path / "5.orbax-checkpoint-tmp").mkdir()
    with caplog.at_level(logging.WARNING, "expertrag_jax"):
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(5, state, {})
        (tmp_path / "9.orbax-checkpoint-tmp-123").mkdir()
        with Checkpoints(tmp_path) as checkpoints:
            assert checkpoints.latest == 5
            checkpoints.save(9, state, {})
        with Checkpoints(tmp_path):
            pass  # nothing is left to tell of
    assert told() == [cut_off.format(5, "starting from the beginning"), cut_off.format(9, "going on from step 5")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["5", "9"]


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


@pytest.fixture(scope="module")
def two(toy, tmp_path_factory):
    """(folder with the checkpoints 5 and 9, what reads one of them, the state in both)."""
    layout, phase, state = entered(toy, partitioning.make_mesh(devices=jax.devices()[:1]))
    folder = tmp_path_factory.mktemp("two")
    with Checkpoints(folder) as checkpoints:
        for step in (5, 9):
            checkpoints.save(step, state, {"seed": 3, "phase": "body"})
    expected = jax.tree.map(np.array, state)

    def read(checkpoints, step):
        assert checkpoints.metadata(step)["seed"] == 3
        return step, checkpoints.restore(step, layout.abstract_state(phase))

    return folder, read, expected


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "nothing": lambda checkpoint: None,
    "empty directory": lambda checkpoint: (shutil.rmtree(checkpoint), checkpoint.mkdir()),
    "metadata missing": lambda checkpoint: (checkpoint / "_CHECKPOINT_METADATA").unlink(),
    "metadata cut": lambda checkpoint: cut(checkpoint / "_CHECKPOINT_METADATA"),
    "metadata flipped": lambda checkpoint: flip(checkpoint / "_CHECKPOINT_METADATA"),
    "tree missing": lambda checkpoint: (checkpoint / "state" / "_METADATA").unlink(),
    "manifest flipped": lambda checkpoint: flip(checkpoint / "state" / "manifest.ocdbt"),
    "data missing": lambda checkpoint: next((checkpoint / "state" / "d").iterdir()).unlink(),
    "data cut": lambda checkpoint: cut(next((checkpoint / "state" / "d").iterdir())),
    "data flipped": lambda checkpoint: flip(next((checkpoint / "state" / "d").iterdir())),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_and_its_step_saved_again(two, damage, tmp_path, caplog, told, toy, mesh):
    folder, read, expected = two
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    DAMAGES[damage](tmp_path / "9")
    with Checkpoints(tmp_path) as checkpoints, caplog.at_level(logging.WARNING, "expertrag_jax"):
        step, state = checkpoints.newest_whole(lambda step: read(checkpoints, step))
        jax.tree.map(np.testing.assert_array_equal, expected, state)
        assert checkpoints.latest == step == (9 if damage == "nothing" else 5)
        warnings = told()
        if damage == "nothing":
            assert not warnings
            return
        assert len(warnings) == 1 and "step 9 is damaged (" in warnings[0] and "going on from step 5" in warnings[0]
        assert (tmp_path / "9.damaged").is_dir()
        checkpoints.save(9, state, {"seed": 3})
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.newest_whole(lambda step: read(checkpoints, step))[0] == 9
    assert {"5", "9", "9.damaged"} <= {path.name for path in tmp_path.iterdir()}


def test_values_that_are_not_what_was_saved_are_noticed(two, tmp_path, toy, mesh, monkeypatch):
    """What no file format notices: whole files with other values."""
    _, read, _ = two
    _, _, state = entered(toy, mesh)
    other = state.replace(params=jax.tree.map(lambda x: x, state.params))
    other.params["body"]["bias"] = other.params["body"]["bias"].at[3].set(2.0**-40)
    with Checkpoints(tmp_path) as checkpoints:
        with monkeypatch.context() as patched:
            described = checkpoint.describe(checkpoint._to_tree(state))
            patched.setattr(checkpoint, "describe", lambda tree: described)
            checkpoints.save(5, other, {"seed": 3})
        checkpoints.wait()
        with pytest.raises(Damaged, match="^body/bias is not what was saved$"):
            read(checkpoints, 5)


def test_where_all_are_damaged_nothing_is_changed(two, tmp_path):
    folder, read, _ = two
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for name in ("5", "9"):
        DAMAGES["data cut"](tmp_path / name)
    names = sorted(path.name for path in tmp_path.iterdir())
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UserError, match=r"No checkpoint in .* can be read \(9: .*; 5: .*start anew"):
            checkpoints.newest_whole(lambda step: read(checkpoints, step))
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    "name, damage, message",
    [
        ("state/_sharding", pipe, "9 is damaged .*_sharding is neither a file nor a folder"),
        ("_CHECKPOINT_METADATA", pipe, "9 is damaged .*_CHECKPOINT_METADATA is neither a file nor a folder"),
        ("_CHECKPOINT_METADATA", lambda path: path.write_text("[" * 100_000), "its metadata is nested too deeply"),
    ],
)
def test_what_would_hang_or_break_the_listing_is_one_sentence(two, tmp_path, name, damage, message):
    folder, _, _ = two
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "9" / name)
    with pytest.raises(UserError, match=f"{message}.*: move it away"):
        Checkpoints(tmp_path)
    with pytest.raises(UserError, match="is damaged"):
        pretrained.read_metadata(tmp_path / "9")


def test_a_checkpoint_that_is_not_of_a_training_is_not_resumed(two, tmp_path, toy, mesh):
    folder, _, _ = two
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    layout, phase, _ = entered(toy, mesh)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UserError, match="step 9 does not say its digests, so no training can resume from it"):
            loop.resume(checkpoints, 9, [phase], layout, {"seed": 3, "digests": {}})


def test_retention_keeps_the_newest_every_n_and_the_best_of_each_phase(toy, mesh, tmp_path, caplog):
    _, _, state = entered(toy, mesh)
    losses = {1: 0.5, 2: 0.1, 3: 0.3, 4: 0.2, 5: None, 6: 9.0, 7: 8.0, 8: 8.0}
    keep = Retention(latest=1, every_steps=5, best=2, metric="eval/loss")

    def save(steps):
        with Checkpoints(tmp_path, keep) as checkpoints:
            for step in steps:
                logged = {} if losses[step] is None else {"loss": 1.0, "eval/loss": losses[step]}
                checkpoints.save(step, state, {"phase": "body" if step < 6 else "head"}, logged)
        return sorted(int(path.name) for path in tmp_path.iterdir() if path.name.isdigit())

    assert save([1, 2, 3]) == [2, 3]
    with caplog.at_level(logging.WARNING, "expertrag_jax"):
        assert save([4, 5]) == [2, 4, 5]  # after a restart, what was measured before still counts
    assert "step 5 is not compared by eval/loss" in caplog.text
    assert save([6, 7, 8]) == [2, 4, 5, 7, 8]


def test_phases_can_be_compared_with_one_another(toy, mesh, tmp_path, caplog):
    """The best of all iterations stays; a phase that the rule does not name is neither kept nor told of."""
    _, _, state = entered(toy, mesh)
    losses = {1: ("em_1", 0.3), 2: ("em_2", 0.1), 3: ("em_3", 0.2), 4: ("copy_4", None), 5: ("em_4", 0.5)}
    with Checkpoints(tmp_path, Retention(latest=1, best=1, phases="em_.*")) as checkpoints:
        for step, (phase, loss) in losses.items():
            checkpoints.save(step, state, {"phase": phase}, {} if loss is None else {"eval/loss": loss})
    assert sorted(int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()) == [2, 5]
    assert "is not compared" not in caplog.text


@pytest.mark.parametrize("values", [{"latest": -1}, {"every_steps": 0}, {"best": -2}])
def test_a_retention_that_means_nothing_is_refused(values):
    with pytest.raises(UserError, match="Retention.* must be a whole number"):
        Retention(**values)
