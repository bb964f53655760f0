"""Compiles a phase's step for the batch shapes to come, while the batches of the first shape train."""

from __future__ import annotations

import concurrent.futures
import contextvars
from collections.abc import Hashable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from expertrag_jax import partitioning
from expertrag_jax.training.state import TrainState
from expertrag_jax.training.step import TrainStep


def signature(batch: Any) -> Hashable:
    """What decides which program a batch needs: its fields, their shapes and dtypes."""
    return jax.tree.structure(batch), tuple((x.shape, str(x.dtype)) for x in jax.tree.leaves(batch))


class Ahead:
    """One thread that compiles, in the order in which the batches will come. A context manager: its end waits for the
    program that is being compiled and drops the others.

    What it compiles is what the step itself would: JAX keeps a lowered function and its program by the shapes and
    shardings of the arguments, and the step's first call with such arguments finds them.
    """

    def __init__(self) -> None:
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "compile")
        self._pending: dict[Hashable, concurrent.futures.Future] = {}

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: Any) -> None:
        self._thread.shutdown(cancel_futures=True)

    def begin(self, step: TrainStep, state: TrainState, batches: Sequence[Any], mesh: Mesh) -> None:
        """Compiles ``step`` for a state like ``state`` and each of ``batches``; nothing where all have one shape."""
        for future in self._pending.values():
            future.cancel()  # of a phase that ended before its data did
        self._pending, shapes = {}, {}
        for batch in batches:
            shapes.setdefault(signature(batch), batch)  # in the order in which they come first
        if len(shapes) < 2:
            return
        context, state = contextvars.copy_context(), _abstract(state)  # activation rules are part of the context
        for shape, batch in shapes.items():
            arrays = _abstract(partitioning.global_batch(batch, mesh))
            self._pending[shape] = self._thread.submit(context.run, _compile, step, state, arrays, mesh)

    def wait(self, shape: Hashable) -> None:
        """Returns when the program for batches of this signature is there, failed, or was never begun."""
        future = self._pending.pop(shape, None)
        if future is not None:
            concurrent.futures.wait([future])  # a failure comes again, in the step's own call


def _abstract(tree: Any) -> Any:
    def one(x: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding, weak_type=x.weak_type)

    return jax.tree.map(one, tree)


def _compile(step: TrainStep, state: TrainState, batch: Any, mesh: Mesh) -> None:
    with jax.set_mesh(mesh):
        step.lower(state, batch).compile()
