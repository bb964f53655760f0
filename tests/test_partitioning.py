"""Rules to specs, meshes, batches; the parts that need devices run in a process with eight."""

import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from expertrag_jax import partitioning
from expertrag_jax.errors import UserError
from expertrag_jax.partitioning import ACTIVATION_RULES, PARAMETER_RULES, MeshConfig

SIZES = {"data": 2, "fsdp": 2, "expert": 2, "tensor": 4}


@pytest.mark.parametrize(
    "axes, rules, expected",
    [
        (("embed", "mlp"), PARAMETER_RULES, P("fsdp", "tensor")),
        (("embed", "joined_kv"), PARAMETER_RULES, P("fsdp", "tensor")),
        (("vocab", "embed"), PARAMETER_RULES, P("tensor", "fsdp")),
        (("heads", "relpos_buckets"), PARAMETER_RULES, P("tensor", None)),
        (("expert", "embed", "expert_mlp"), PARAMETER_RULES, P("expert", "fsdp", "tensor")),
        (("embed", "layers", "mlp"), PARAMETER_RULES, P("fsdp", None, "tensor")),
        (("embed", None, "unmodeled"), PARAMETER_RULES, P("fsdp", None, None)),
        (("batch", "length", "embed"), ACTIVATION_RULES, P(("data", "fsdp", "expert"), None, None)),
        (("passages", "length", "heads", "kv"), ACTIVATION_RULES, P(None, None, "tensor", None)),
        (("batch", "expert"), ACTIVATION_RULES, P(("data", "fsdp", "expert"), None)),  # each mesh axis once
        (("mlp", "vocab"), ACTIVATION_RULES, P("tensor", None)),
    ],
)  # fmt: skip
def test_specs_follow_the_rules(axes, rules, expected):
    assert partitioning.partition_spec(axes, rules, SIZES) == expected


def test_axes_of_size_1_are_left_out():
    sizes = {"data": 8, "fsdp": 1, "expert": 1, "tensor": 1}
    assert partitioning.partition_spec(("batch", "mlp"), ACTIVATION_RULES, sizes) == P("data", None)


def test_a_dimension_that_does_not_divide_is_named_or_replicated():
    mesh = jax.sharding.AbstractMesh((1, 2, 1, 4), partitioning.MESH_AXES)
    axes = {"encoder": {"wi": {"kernel": ("embed", "mlp")}, "scale": None}}
    shapes = {"encoder": {"wi": {"kernel": jnp.zeros((8, 6))}, "scale": jnp.zeros((8,))}}
    with pytest.raises(UserError) as error:
        partitioning.shardings(axes, shapes, mesh)
    assert str(error.value).startswith(
        "encoder/wi/kernel: dimension 1 ('mlp', size 6) does not divide over the mesh axis tensor=4"
    )
    found = partitioning.shardings(axes, shapes, mesh, indivisible="replicate")
    assert found["encoder"]["wi"]["kernel"].spec == P("fsdp", None)
    assert found["encoder"]["scale"].spec == P()


@pytest.mark.parametrize(
    "axes, message",
    [
        (("embed", "widht"), "no rule for the logical axis 'widht'; there are batch, expert"),
        (("embed",), "one per dim"),
    ],
)
def test_wrong_logical_axes_are_errors(axes, message):
    with pytest.raises(UserError, match=message):
        partitioning.partition_spec(axes, PARAMETER_RULES, SIZES, (4, 4), "w")


@pytest.mark.parametrize(
    "config, devices, expected",
    [
        (MeshConfig(), 8, (8, 1, 1, 1)),
        (MeshConfig(fsdp=8), 8, (1, 8, 1, 1)),
        (MeshConfig(data=2, expert=-1), 8, (2, 1, 4, 1)),
        (MeshConfig(data=2, tensor=4), 8, (2, 1, 1, 4)),
        (MeshConfig(data=3), 8, "data=3, fsdp=1, expert=1, tensor=1 does not cover 8 devices"),
        (MeshConfig(tensor=3), 8, "data=-1, fsdp=1, expert=1, tensor=3 does not cover 8 devices"),
        (MeshConfig(tensor=16), 8, "does not cover 8 devices"),
        (MeshConfig(data=-1, fsdp=-1), 8, "at most one of the sizes is -1"),
    ],
)
def test_mesh_sizes(config, devices, expected):
    if isinstance(expected, tuple):
        assert config.sizes(devices) == expected
    else:
        with pytest.raises(UserError, match=expected):
            config.sizes(devices)


def slices_of(count, per_slice):
    """Stand-ins for devices in several slices, not in order."""
    fields = {"device_kind": "cpu", "platform": "cpu"}
    devices = [(i, i % count) for i in range(count * per_slice)]
    return [types.SimpleNamespace(id=i, slice_index=s, process_index=s, **fields) for i, s in devices]


@pytest.mark.parametrize(
    "config, axis", [(MeshConfig(data=4, tensor=2), 0), (MeshConfig(data=1, fsdp=4, tensor=2), 1)]
)
def test_only_one_axis_crosses_slices(config, axis):
    devices = np.empty(8, object)
    devices[:] = slices_of(2, 4)
    inner, across = partitioning.slice_shapes(config.sizes(8), 2)
    array = partitioning.mesh_utils.create_hybrid_device_mesh(inner, across, list(devices))
    assert array.shape == config.sizes(8)
    for index, device in np.ndenumerate(array):
        assert device.slice_index == index[axis] // (array.shape[axis] // 2)


def test_slices_that_do_not_divide():
    assert partitioning.slice_shapes((1, 3, 1, 2), 2) is None
    with pytest.raises(UserError, match="num_slices=2 and the devices lie in 1 slices"):
        partitioning.make_mesh(MeshConfig(num_slices=2), jax.devices()[:1])


def test_without_a_mesh_nothing_is_constrained_but_names_are_checked():
    x = jnp.ones((4, 3))
    assert partitioning.constrain(x, "batch", "embed") is x
    assert set(partitioning.mesh_axis_sizes().values()) == {1}
    with pytest.raises(UserError, match="no rule for the logical axis 'bach'"):
        partitioning.constrain(x, "bach", "embed")


ON_EIGHT_DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, PartitionSpec as P
from expertrag_jax import partitioning
from expertrag_jax.errors import UserError

mesh = partitioning.make_mesh(partitioning.MeshConfig(data=2, fsdp=-1, tensor=2))
assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "expert": 1, "tensor": 2}, mesh
assert set(mesh.axis_types) == {AxisType.Auto}

double = jax.jit(lambda x: partitioning.constrain(x * 2, "batch", "length", "mlp"))
inside = []

def local(x):
    inside.append(partitioning.mesh_axis_sizes())
    return partitioning.constrain(x, "batch", "mlp")

with jax.set_mesh(mesh):
    assert partitioning.mesh_axis_sizes() == dict(mesh.shape)
    y = double(jnp.ones((8, 3, 4)))
    assert y.sharding.spec == P(("data", "fsdp"), None, "tensor"), y.sharding
    assert double(jnp.ones((3, 3, 4))).sharding.spec == P(None, None, "tensor")
    rows = P(partitioning.BATCH_AXES)
    jax.jit(jax.shard_map(local, in_specs=rows, out_specs=rows))(jnp.ones((8, 2)))
    assert set(inside[0].values()) == {1}
    with partitioning.activation_rules((("batch", None), ("length", "tensor"), ("mlp", None))):
        z = jax.jit(lambda x: partitioning.constrain(x, "batch", "length", "mlp"))(jnp.ones((8, 2, 4)))
    assert z.sharding.spec == P(None, "tensor"), z.sharding

batch = {"x": np.arange(24).reshape(8, 3), "absent": None}
whole = partitioning.global_batch(batch, mesh)
assert whole["x"].sharding.shard_shape((8, 3)) == (2, 3) and whole["absent"] is None
np.testing.assert_array_equal(whole["x"], batch["x"])
try:
    partitioning.global_batch({"x": np.ones((6, 3))}, mesh)
except UserError as error:
    assert "x of global shape (6, 3) does not divide over 4 batch shards" in str(error)
else:
    raise AssertionError("6 rows over 4 shards")
print("fine")
"""


def test_meshes_constraints_and_batches_on_eight_devices(xla_flags):
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {
        "PYTHONPATH": str(root),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla_flags(8),
    }
    command = [sys.executable, "-c", ON_EIGHT_DEVICES]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and result.stdout.strip() == "fine", result.stderr
