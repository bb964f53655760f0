"""The state of a run, and how it lies on the mesh."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from expertrag_jax import partitioning
from expertrag_jax.systems.system import Phase, System
from expertrag_jax.training import parameters


@struct.dataclass
class TrainState:
    """Everything that a step changes.

    Attributes:
      step: int32 [], optimizer steps taken in the whole run; fixes the step's random numbers.
      phase: int32 [], index of the current phase.
      phase_step: int32 [], steps taken in the current phase; it is also the position in the phase's data.
      params: nested dict of float32 arrays.
      optimizer_state: of the current phase, over the flat dict of its trainable parameters.
    """

    step: jax.Array
    phase: jax.Array
    phase_step: jax.Array
    params: Any
    optimizer_state: Any


class Layout:
    """Where each array of a system's state lies: the mesh, and the logical axes' way onto it.

    Attributes:
      mesh: the device mesh.
      params: tree of NamedSharding for ``system.init``'s tree.
    """

    def __init__(self, system: System, mesh: Mesh, rules: partitioning.Rules = partitioning.PARAMETER_RULES):
        """Raises UserError where a parameter does not divide over the mesh."""
        self.mesh = mesh
        self.shapes = jax.eval_shape(system.init, jax.random.key(0))
        self.params = partitioning.shardings(system.logical_axes(), self.shapes, mesh, rules)

    def initial_params(self, system: System, seed: int) -> Any:
        """Fresh parameters, made in place on the mesh; the same numbers on every mesh."""
        return jax.jit(system.init, out_shardings=self.params)(jax.random.key(seed))

    @property
    def abstract_params(self) -> Any:
        """Shapes, dtypes and shardings of the parameters, as ShapeDtypeStructs."""
        return _placed(self.shapes, self.params)

    def abstract_state(self, phase: Phase) -> TrainState:
        """Shapes, dtypes and shardings of the state in a phase, as ShapeDtypeStructs."""
        trainable, _ = parameters.split(self.shapes, phase.trainable)
        optimizer_state = jax.eval_shape(phase.make_optimizer().init, trainable)
        place = partitioning.replicated(self.mesh)
        counter = jax.ShapeDtypeStruct((), jnp.int32, sharding=place)
        return TrainState(
            step=counter,
            phase=counter,
            phase_step=counter,
            params=self.abstract_params,
            optimizer_state=_placed(optimizer_state, self.optimizer_shardings(optimizer_state)),
        )

    def optimizer_shardings(self, optimizer_state: Any) -> Any:
        """Shardings of an optimizer state: moments lie as their parameters do, counters are replicated."""
        shapes = parameters.flatten(self.shapes)
        specs = {name: sharding.spec for name, sharding in parameters.flatten(self.params).items()}

        def one(path, leaf):
            name = str(getattr(path[-1], "key", "")) if path else ""
            spec = PartitionSpec()
            if name in shapes:
                prefer_last = "v_row" in jax.tree_util.keystr(path)
                spec = moment_spec(shapes[name].shape, specs[name], leaf.shape, prefer_last)
            return NamedSharding(self.mesh, spec)

        return jax.tree_util.tree_map_with_path(one, optimizer_state)


def moment_spec(
    shape: Sequence[int], spec: PartitionSpec, moment_shape: Sequence[int], prefer_last: bool
) -> PartitionSpec:
    """The spec of one optimizer array from its parameter's.

    A moment of the parameter's shape lies as the parameter; one that lacks a dimension (Adafactor's factored
    rows and columns) lies as the parameter without that dimension; anything else is replicated.

    Args:
      shape, spec: the parameter's shape and spec.
      moment_shape: the optimizer array's shape.
      prefer_last: which dimension a square parameter's factor lacks: the last possible one (rows) or the
        first.
    """
    axes = [*spec, *[None] * (len(shape) - len(spec))]
    if tuple(moment_shape) == tuple(shape):
        return PartitionSpec(*axes)
    lacking = [d for d in range(len(shape)) if tuple(np.delete(shape, d)) == tuple(moment_shape)]
    if not lacking:
        return PartitionSpec()
    lost = lacking[-1] if prefer_last else lacking[0]
    return PartitionSpec(*axes[:lost], *axes[lost + 1 :])


def _placed(shapes: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs with shardings."""
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes,
        shardings,
    )
