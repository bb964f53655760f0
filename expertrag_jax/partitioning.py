"""The mesh, the logical axis rules, and the shardings that follow from them.

Model code names its dimensions by what they mean (``batch``, ``embed``, ``mlp``, ...: T5X's names); two
tables map these names to mesh axes. Parameters and activations differ in one name: ``embed`` of a parameter
is split over ``fsdp`` (gathered where it is used), ``embed`` of an activation is not, because its batch
already is.

Mesh axes, any of which may be 1:

* ``data``: batch parallelism; parameters are replicated over it. Over several slices it is the one that
  crosses DCN.
* ``fsdp``: batch parallelism with parameters and optimizer state split.
* ``expert``: batch parallelism outside the experts, and the experts' owners inside them.
* ``tensor``: heads, feed-forward width and vocabulary split.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from expertrag_jax.errors import UserError
from expertrag_jax.ranges import Count, checked

MESH_AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")

Rules = Sequence[tuple[str, str | Sequence[str] | None]]

ACTIVATION_RULES: Rules = (
    ("batch", BATCH_AXES),
    ("expert", "expert"),
    ("mlp", "tensor"),
    ("expert_mlp", "tensor"),
    ("heads", "tensor"),
    ("joined_kv", "tensor"),
    ("vocab", "tensor"),
    ("embed", None),
    ("kv", None),
    ("length", None),
    ("passages", None),
    ("relpos_buckets", None),
    ("layers", None),
    ("stack", None),
    ("unmodeled", None),
)

PARAMETER_RULES: Rules = tuple((name, "fsdp" if name == "embed" else axes) for name, axes in ACTIVATION_RULES)

_activation_rules = contextvars.ContextVar("activation_rules", default=ACTIVATION_RULES)

MeshSize = Literal[-1] | Count
"""The size of a mesh axis; -1 is the rest of the devices."""


@checked
@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1, "the rest of the devices".

    Attributes:
      data, fsdp, expert, tensor: see the module's docstring.
      num_slices: slices joined by the data-centre network (DCN); they split ``data``, or ``fsdp`` where
        ``data`` does not divide. None: read off the devices, and ignored where neither divides.
    """

    data: MeshSize = -1
    fsdp: MeshSize = 1
    expert: MeshSize = 1
    tensor: MeshSize = 1
    num_slices: Count | None = None

    def sizes(self, num_devices: int) -> tuple[int, int, int, int]:
        """The four axis sizes on ``num_devices`` devices; UserError if their product differs."""
        sizes = [getattr(self, axis) for axis in MESH_AXES]
        written = ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
        if sizes.count(-1) > 1:
            raise UserError(f"Mesh {written}: at most one of the sizes is -1 (the rest).")
        if -1 in sizes:
            sizes[sizes.index(-1)] = max(1, num_devices // math.prod(size for size in sizes if size != -1))
        if math.prod(sizes) != num_devices:
            raise UserError(
                f"Mesh {written} does not cover {num_devices} devices: the four sizes multiply to the "
                "number of devices; set one of them to -1 to take the rest."
            )
        return tuple(sizes)


def make_mesh(config: MeshConfig = MeshConfig(), devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh ``(data, fsdp, expert, tensor)`` over ``devices`` (default: all), hybrid over several slices.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or ``num_slices`` is not the devices'
        number or divides neither ``data`` nor ``fsdp``.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = config.sizes(len(devices))
    axis_types = (AxisType.Auto,) * len(MESH_AXES)  # since JAX 0.8.1 the default is Explicit
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if config.num_slices not in (None, slices):
        raise UserError(
            f"num_slices={config.num_slices} and the devices lie in {slices} slices: leave it out."
        )
    shapes = slice_shapes(sizes, slices) if slices > 1 else None
    if shapes:
        return Mesh(mesh_utils.create_hybrid_device_mesh(*shapes, devices), MESH_AXES, axis_types=axis_types)
    if config.num_slices not in (None, 1):
        raise UserError(
            f"{slices} slices divide neither data={sizes[0]} nor fsdp={sizes[1]}: make one a multiple."
        )
    return jax.make_mesh(sizes, MESH_AXES, axis_types, devices=devices)


def slice_shapes(sizes: Sequence[int], slices: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Mesh sizes -> (shape inside a slice, shape across slices): over ``data``, else ``fsdp``, else None."""
    for axis in (MESH_AXES.index("data"), MESH_AXES.index("fsdp")):
        if sizes[axis] % slices == 0:
            across = tuple(slices if i == axis else 1 for i in range(len(sizes)))
            return tuple(size // outer for size, outer in zip(sizes, across, strict=True)), across
    return None


def partition_spec(
    logical_axes: Sequence[str | None],
    rules: Rules,
    axis_sizes: dict[str, int],
    shape: Sequence[int] | None = None,
    name: str = "array",
    indivisible: str = "error",
) -> PartitionSpec:
    """The PartitionSpec of one array.

    Args:
      logical_axes: one name per dimension; None is unsharded.
      rules: (logical name, mesh axis, axes or None) pairs. A mesh axis shards one dimension of an array at
        most: where two dimensions ask for it, the first one has it.
      axis_sizes: size of each mesh axis; axes of size 1 (or absent) are left out.
      shape: when given, every sharded dimension is checked.
      name: how errors call the array.
      indivisible: ``"error"``, or ``"replicate"`` to leave a dimension that does not divide unsharded.
    Raises:
      UserError: an unknown logical name, a rank that differs from the shape's, or a dimension that does not
        divide.
    """
    table = dict(rules)
    if shape is not None and len(shape) != len(logical_axes):
        raise UserError(
            f"{name} of shape {tuple(shape)} has logical axes {tuple(logical_axes)}: give one per dimension."
        )
    used: set[str] = set()
    spec = []
    for dimension, logical in enumerate(logical_axes):
        if logical is not None and logical not in table:
            raise UserError(
                f"{name}: no rule for the logical axis '{logical}'; there are {', '.join(table)}."
            )
        wanted = table.get(logical) or ()
        wanted = (wanted,) if isinstance(wanted, str) else tuple(wanted)
        axes = tuple(axis for axis in wanted if axis_sizes.get(axis, 1) > 1 and axis not in used)
        parts = math.prod(axis_sizes[axis] for axis in axes)
        if shape is not None and shape[dimension] % parts:
            if indivisible != "replicate":
                sizes = " x ".join(f"{axis}={axis_sizes[axis]}" for axis in axes)
                raise UserError(
                    f"{name}: dimension {dimension} ('{logical}', size {shape[dimension]}) does not divide "
                    f"over the mesh axis {sizes}: change the size or the mesh."
                )
            axes = ()
        used.update(axes)
        spec.append(axes[0] if len(axes) == 1 else axes or None)
    return PartitionSpec(*spec)


def shardings(
    logical_axes: Any, shapes: Any, mesh: Mesh, rules: Rules = PARAMETER_RULES, indivisible: str = "error"
) -> Any:
    """A tree of NamedSharding for a tree of parameters.

    Args:
      logical_axes: tree whose leaves are tuples of logical names (or None: replicated).
      shapes: the same tree with arrays, ShapeDtypeStructs, or anything with ``.shape``.
      mesh, rules, indivisible: see ``partition_spec``.
    Raises:
      UserError: see ``partition_spec``; the message names parameter, dimension and axis size.
    """
    sizes = dict(mesh.shape)

    def one(path, axes, array):
        if axes is None:
            return NamedSharding(mesh, PartitionSpec())
        spec = partition_spec(tuple(axes), rules, sizes, array.shape, path_name(path), indivisible)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(one, logical_axes, shapes, is_leaf=is_axes)


def is_axes(node: Any) -> bool:
    """Whether a node of a tree of logical axes is a leaf: a tuple of names, or None."""
    return node is None or isinstance(node, (tuple, PartitionSpec))


def path_name(path: Sequence[Any]) -> str:
    """A key path as ``a/b/c``."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over (data, fsdp, expert), the rest unsharded."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def global_batch(batch: Any, mesh: Mesh) -> Any:
    """This process's rows -> global arrays sharded by ``batch_sharding``.

    Args:
      batch: a pytree of numpy arrays with a leading batch axis; process i of n holds the i-th contiguous
        slice.
    Raises:
      UserError: the global batch size is not a multiple of the batch shards, or these not of the processes.
    """
    sharding = batch_sharding(mesh)
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)

    if shards % jax.process_count():
        raise UserError(
            f"{jax.process_count()} processes share {shards} batch shards (data x fsdp x expert): make the "
            "number of shards a multiple of the number of processes."
        )

    def one(path, rows):
        rows = np.asarray(rows)
        total = rows.shape[0] * jax.process_count() if rows.ndim else 0
        if not rows.ndim or total % shards:
            raise UserError(
                f"Batch field {path_name(path)} of global shape {(total, *rows.shape[1:])} does not divide "
                f"over {shards} batch shards (data x fsdp x expert): make BATCH_SIZE a multiple of {shards}."
            )
        return jax.make_array_from_process_local_data(sharding, rows, (total, *rows.shape[1:]))

    return jax.tree_util.tree_map_with_path(one, batch)


def mesh_axis_sizes() -> dict[str, int]:
    """Sizes of the context mesh's axes that the compiler shards: all 1 without a mesh or in a shard_map."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {axis: 1 for axis in MESH_AXES}
    if not mesh.empty:
        automatic = [kind != AxisType.Manual for kind in mesh.axis_types]
        sizes |= {
            axis: mesh.shape[axis] for axis, auto in zip(mesh.axis_names, automatic, strict=True) if auto
        }
    return sizes


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Lays an activation out over the context mesh (``jax.set_mesh``); the identity without one.

    ``constrain(y, "batch", "length", "embed")``. A dimension that does not divide stays replicated: the few
    rows of a last evaluation batch, say. Raises UserError on an unknown name or another rank.
    """
    sizes = mesh_axis_sizes()
    rules = _activation_rules.get()
    spec = partition_spec(logical_axes, rules, sizes, x.shape, "activation", indivisible="replicate")
    if max(sizes.values()) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec)


@contextlib.contextmanager
def activation_rules(rules: Rules):
    """While a function is traced inside this block, ``constrain`` follows ``rules``."""
    token = _activation_rules.set(rules)
    try:
        yield
    finally:
        _activation_rules.reset(token)
