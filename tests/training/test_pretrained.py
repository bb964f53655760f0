"""Starting from trained parameters, and parameters alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from expertrag_jax.errors import UserError
from expertrag_jax.training import pretrained

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
        pretrained.checkpoint_dir(tmp_path)
