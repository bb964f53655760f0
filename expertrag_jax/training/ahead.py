"""Compiles steps for the batch shapes to come, while the batches of the first shape train."""

from __future__ import annotations

import concurrent.futures
import contextvars
import dataclasses
from collections.abc import Hashable, Iterable
from typing import Any

import jax
from jax.sharding import Mesh

from expertrag_jax import partitioning
from expertrag_jax.training.state import TrainState
from expertrag_jax.training.step import TrainStep


def signature(batch: Any) -> Hashable:
    """What decides which program a batch needs: its fields, their shapes and dtypes."""
    return jax.tree.structure(batch), tuple((x.shape, str(x.dtype)) for x in jax.tree.leaves(batch))


@dataclasses.dataclass(frozen=True)
class Program:
    """What is to be compiled: a step for a state and a batch; of the two, shapes and shardings count."""

    step: TrainStep
    state: TrainState
    batch: Any

    @property
    def key(self) -> Hashable:
        """Equal for equal programs."""
        return key(self.step, self.batch)


def key(step: TrainStep, batch: Any) -> Hashable:
    """What tells the programs of a run apart."""
    return id(step), signature(batch)


class Ahead:
    """One thread that compiles, in the order in which the batches will come. A context manager: its end waits for the
    program that is being compiled and drops the others.

    What it compiles is what the step itself would: JAX keeps a lowered function and its program by the shapes and
    shardings of the arguments, and the step's first call with such arguments finds them.
    """

    def __init__(self) -> None:
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "compile")
        self._pending: dict[Hashable, concurrent.futures.Future] = {}
        self._begun: set[Hashable] = set()

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: Any) -> None:
        self._thread.shutdown(cancel_futures=True)

    def begin(self, programs: Iterable[Program], mesh: Mesh) -> None:
        """Compiles programs in this order, those that were not begun before; nothing if there is only one.

        Begun ones that are not among them are dropped: their phase ended before its data did.
        """
        wanted: dict[Hashable, Program] = {}
        for program in programs:
            wanted.setdefault(program.key, program)  # in the order in which they come first
        for name, future in self._pending.items():
            if name not in wanted:
                future.cancel()
        self._pending = {name: future for name, future in self._pending.items() if name in wanted}
        if len(wanted) < 2 and not self._pending:
            return
        context = contextvars.copy_context()  # activation rules are part of it
        for name, program in wanted.items():
            if name in self._begun:
                continue
            self._begun.add(name)
            arrays = _abstract(partitioning.global_batch(program.batch, mesh))
            arguments = (program.step, _abstract(program.state), arrays, mesh)
            self._pending[name] = self._thread.submit(context.run, _compile, *arguments)

    def wait(self, name: Hashable) -> None:
        """Returns when the program of this key is there, failed, or was never begun."""
        future = self._pending.pop(name, None)
        if future is not None:
            concurrent.futures.wait([future])  # a failure comes again, in the step's own call


def _abstract(tree: Any) -> Any:
    def one(x: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding, weak_type=x.weak_type)

    return jax.tree.map(one, tree)


def _compile(step: TrainStep, state: TrainState, batch: Any, mesh: Mesh) -> None:
    with jax.set_mesh(mesh):
        step.lower(state, batch).compile()
