"""Fingerprints: the same on every mesh, another one for every changed bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from expertrag_jax import partitioning
from expertrag_jax.training.fingerprints import fingerprints, first_difference

DTYPES = (jnp.float32, jnp.bfloat16, jnp.int32, jnp.int8, jnp.bool_)


def arrays(dtype):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(8, 6)) * 9
    return {"a": jnp.asarray(values > 0 if dtype == jnp.bool_ else values, dtype), "b": {"c": jnp.asarray(3, dtype)}}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_on_every_mesh_and_another_for_a_changed_element_or_place(dtype):
    tree = arrays(dtype)
    one = fingerprints(tree)
    assert list(one) == ["a", "b/c"] and all(0 <= number < 2**32 for number in one.values())
    mesh = partitioning.make_mesh(partitioning.MeshConfig(data=4, fsdp=2))
    for spec in (PartitionSpec("data", "fsdp"), PartitionSpec(None, "fsdp"), PartitionSpec(("data", "fsdp"))):
        split = jax.device_put(tree["a"], NamedSharding(mesh, spec))
        scalar = jax.device_put(tree["b"]["c"], NamedSharding(mesh, PartitionSpec()))
        assert fingerprints({"a": split, "b": {"c": scalar}}) == one
    changed = tree | {"a": tree["a"].at[7, 5].set(jnp.asarray(0, dtype) == tree["a"][7, 5])}
    swapped = tree | {"a": tree["a"][::-1]}
    for other in (changed, swapped):
        assert first_difference(one, fingerprints(other)) == "a"
    assert first_difference(one, fingerprints(tree)) is None
    assert first_difference({"a": one["a"]}, one) == "b/c"


def test_every_bit_counts():
    words = np.arange(4, dtype=np.uint32)
    flipped = [words ^ np.eye(1, 4, 2, dtype=np.uint32)[0] * np.uint32(1 << bit) for bit in range(32)]
    seen = {fingerprints({"x": jnp.asarray(each.view(np.float32))})["x"] for each in [words, *flipped]}
    assert len(seen) == 33


def test_nothing_has_none():
    assert fingerprints({}) == {}
