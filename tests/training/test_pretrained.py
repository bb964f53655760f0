"""Starting from trained parameters, and parameters alone."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from expertrag_jax.errors import UserError
from expertrag_jax.training import checkpoint, integrity, pretrained
from expertrag_jax.training.checkpoint import Checkpoints
from expertrag_jax.training.state import TrainState

SHAPES = {"encoder": {"w": (2, 3)}, "decoder": {"w": (3,)}}


def tree(shapes, value):
    return jax.tree.map(
        lambda s: jnp.full(s, value, jnp.float32), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "params"
    pretrained.save_parameters(path, tree(SHAPES, 1.0), {"phase": "x"})
    return path


@pytest.fixture(scope="module")
def nested(tmp_path_factory):
    path = tmp_path_factory.mktemp("nested") / "params"
    pretrained.save_parameters(path, tree({"query_encoder": SHAPES}, 2.0))
    return path


def test_parameters_alone_come_back(exported):
    restored = pretrained.restore_parameters(exported, jax.eval_shape(lambda: tree(SHAPES, 0.0)))
    jax.tree.map(np.testing.assert_array_equal, restored, tree(SHAPES, 1.0))
    assert pretrained.read_metadata(exported) == {"phase": "x"}
    with pytest.raises(UserError, match="exists already"):
        pretrained.save_parameters(exported, restored)


def test_a_path_fills_shared_subtrees_and_leaves_the_rest(exported):
    found = pretrained.start_from(
        str(exported), tree({"encoder": SHAPES["encoder"], "gate": {"w": (4,)}}, 0.0)
    )
    np.testing.assert_array_equal(found["encoder"]["w"], np.ones((2, 3)))
    np.testing.assert_array_equal(found["gate"]["w"], np.zeros(4))
    assert set(found) == {"encoder", "gate"}


def test_a_map_fills_subtrees_from_whole_trees_or_from_subtrees_of_that_name(exported, nested):
    shapes = SHAPES | {"selector": SHAPES, "query_encoder": SHAPES}
    sources = {"": str(exported), "selector": str(exported), "query_encoder": str(nested)}
    found = pretrained.start_from(sources, tree(shapes, 0.0))
    jax.tree.map(np.testing.assert_array_equal, found["selector"], tree(SHAPES, 1.0))
    jax.tree.map(np.testing.assert_array_equal, found["query_encoder"], tree(SHAPES, 2.0))
    np.testing.assert_array_equal(found["decoder"]["w"], np.ones(3))


@pytest.mark.parametrize(
    "sources, shapes, message",
    [
        (
            "",
            {"encoder": {"w": (2, 4)}},
            r"encoder/w is \(2, 3\) in the checkpoint and \(2, 4\) in the model",
        ),
        ("", {"encoder": {"w": (2, 3), "b": (3,)}}, r"encoder/b is absent in the checkpoint"),
        ("", {"other": {"w": (2, 3)}}, "nothing of the model's other"),
        ("selector", {"encoder": {"w": (2, 3)}}, "names the subtree 'selector'; the model has encoder"),
        ("selector", {"selector": {"encoder": {"w": (2, 3)}}}, "decoder/w is .* absent in the model"),
    ],
)
def test_what_does_not_fit_is_an_error(exported, sources, shapes, message):
    with pytest.raises(UserError, match=message):
        pretrained.start_from({sources: str(exported)}, tree(shapes, 0.0))


def test_a_folder_without_checkpoint_is_an_error(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        pretrained.read_metadata(tmp_path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """MODEL_DIR with the checkpoints 5 and 9, which hold fives and nines."""
    folder = tmp_path_factory.mktemp("run")
    with Checkpoints(folder / "checkpoints", asynchronous=False) as checkpoints:
        for step in (5, 9):
            place = (jnp.int32(step),) * 3
            checkpoints.save(step, TrainState(*place, tree(SHAPES, step), {}), {"phase": f"at {step}"})
    return folder


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


DAMAGES = {
    "metadata missing": lambda checkpoint: (checkpoint / "_CHECKPOINT_METADATA").unlink(),
    "metadata flipped": lambda checkpoint: flip(checkpoint / "_CHECKPOINT_METADATA"),
    "tree missing": lambda checkpoint: (checkpoint / "state" / "_METADATA").unlink(),
    "data flipped": lambda checkpoint: [flip(path) for path in (checkpoint / "state").rglob("d/*")],
    "empty directory": lambda checkpoint: (shutil.rmtree(checkpoint), checkpoint.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_refused_where_it_is_named(run, damage, tmp_path, caplog, told):
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    shapes = jax.eval_shape(lambda: tree(SHAPES, 0.0))
    fresh = tree({"encoder": SHAPES["encoder"], "selector": SHAPES}, 0.0)
    assert pretrained.restore_parameters(tmp_path, shapes)["decoder"]["w"][0] == 9
    DAMAGES[damage](tmp_path / "checkpoints" / "9")
    for path in (tmp_path, tmp_path / "checkpoints"):
        caplog.clear()
        found = pretrained.restore_parameters(path, shapes)
        jax.tree.map(np.testing.assert_array_equal, found, tree(SHAPES, 5.0))
        (warning,) = told()
        assert f"{tmp_path}/checkpoints/9 is damaged (" in warning and "taking step 5" in warning
    started = pretrained.start_from({"": str(tmp_path), "selector": str(tmp_path)}, fresh)
    jax.tree.map(np.testing.assert_array_equal, started, jax.tree.map(lambda x: x + 5, fresh))
    with pytest.raises(UserError, match="checkpoints/9 is damaged .*: name another one, or its MODEL_DIR"):
        pretrained.restore_parameters(tmp_path / "checkpoints" / "9", shapes)
    DAMAGES[damage](tmp_path / "checkpoints" / "5")
    with pytest.raises(UserError, match=r"No checkpoint in .* can be read \(9: .*; 5: "):
        pretrained.start_from(str(tmp_path), fresh)


def test_values_that_are_not_what_was_saved_are_noticed_in_each_dtype(tmp_path, monkeypatch):
    """What no file format notices: whole files with other values."""
    state = TrainState(*(jnp.int32(5),) * 3, tree(SHAPES, 5.0), {})
    half = jax.eval_shape(lambda: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree(SHAPES, 0.0)))
    for folder, value in (("good", 5.0), ("bad", 5.0 + 2.0**-20)):
        described = integrity.describe(checkpoint._to_tree(state))
        monkeypatch.setattr(checkpoint, "describe", lambda tree, described=described: described)
        with Checkpoints(tmp_path / folder, asynchronous=False) as checkpoints:
            checkpoints.save(5, state.replace(params=tree(SHAPES, value)), {})
    assert pretrained.restore_parameters(tmp_path / "good", half)["decoder"]["w"].dtype == jnp.bfloat16
    with pytest.raises(UserError, match="w is not what was saved"):
        pretrained.restore_parameters(tmp_path / "bad", half)
