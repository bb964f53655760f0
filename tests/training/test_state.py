"""Layouts: optimizer moments lie as their parameters do."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from expertrag_jax.systems.system import Phase
from expertrag_jax.training import optimizer, parameters
from expertrag_jax.training.state import Layout, moment_spec


@pytest.mark.parametrize(
    "shape, spec, moment, last, expected",
    [
        ((8, 4), P("fsdp", "tensor"), (8, 4), False, P("fsdp", "tensor")),
        ((8, 4), P("fsdp", "tensor"), (8,), False, P("fsdp")),
        ((8, 4), P("fsdp", "tensor"), (4,), False, P("tensor")),
        ((8, 8), P("fsdp", "tensor"), (8,), True, P("fsdp")),
        ((8, 8), P("fsdp", "tensor"), (8,), False, P("tensor")),
        ((2, 8, 4), P("expert", "fsdp"), (2, 4), False, P("expert", None)),
        ((8, 4), P("fsdp", "tensor"), (1,), False, P()),
    ],
)
def test_moment_spec(shape, spec, moment, last, expected):
    assert moment_spec(shape, spec, moment, last) == expected


def test_factored_moments_follow_their_parameters_on_a_mesh(toy):
    mesh = jax.sharding.AbstractMesh((1, 2, 1, 4), ("data", "fsdp", "expert", "tensor"))
    rule = optimizer.adafactor(0.1, min_dim_size_to_factor=4)
    state = Layout(toy.Toy(), mesh).abstract_state(Phase("p", 1, toy.loss, rule))
    by_name = {
        jax.tree_util.keystr(path): leaf.sharding.spec
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.optimizer_state)
    }
    found = {name.split(".")[-1]: spec for name, spec in by_name.items() if "body/kernel" in name}
    assert found["v_row['body/kernel']"] == P("fsdp") and found["v_col['body/kernel']"] == P("tensor")
    assert state.params["body"]["bias"].sharding.spec == P("tensor")


def test_split_and_join_are_inverse_and_patterns_match_whole_paths(toy):
    params = {"gate": {"w": 1, "b": 2}, "gate_like": {"w": 3}}
    trainable, frozen = parameters.split(params, ("gate/.*",))
    assert trainable == {"gate/b": 2, "gate/w": 1} and frozen == {"gate_like/w": 3}
    assert parameters.join(trainable, frozen) == params
