"""The trainer's own step of one phase, compiled for one batch: its memory, and its time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import jax

from expertrag_jax import partitioning
from expertrag_jax.systems.system import System
from expertrag_jax.training import phases
from expertrag_jax.training.state import Layout
from expertrag_jax.training.step import make_train_step


class CompiledStep:
    """The step of a system's first phase on all devices, with donated state.

    Attributes:
      parameters, parameter_bytes: number and size of the system's parameters.
      state_bytes: parameters, optimizer state and counters, on one device.
      temp_bytes: what the compiler reserves beside arguments and results, on one device: activations, gradients.
      peak_bytes: arguments, results that do not lie where arguments lay, and temporaries, on one device.
    """

    def __init__(self, system: System, batch: Any, microbatches: int = 1):
        phase, self._mesh = system.phases[0], partitioning.make_mesh()
        with jax.set_mesh(self._mesh):
            layout = Layout(system, self._mesh)
            shardings = jax.tree.map(lambda leaf: leaf.sharding, layout.abstract_state(phase))
            step = make_train_step(
                phase.loss, phase.make_optimizer(), phase.trainable,
                microbatches=microbatches, state_shardings=shardings,
            )  # fmt: skip
            self._batch = partitioning.global_batch(batch, self._mesh)
            self._state = phases.enter(layout.initial_params(system, 0), 0, 0, phase, layout)
            self._step = step.lower(self._state, self._batch).compile()
        memory = self._step.memory_analysis()
        self.temp_bytes, self.state_bytes = memory.temp_size_in_bytes, memory.alias_size_in_bytes
        results = memory.output_size_in_bytes - memory.alias_size_in_bytes
        self.peak_bytes = memory.argument_size_in_bytes + results + memory.temp_size_in_bytes
        leaves = jax.tree.leaves(self._state.params)
        self.parameters, self.parameter_bytes = sum(x.size for x in leaves), sum(x.nbytes for x in leaves)

    def run(self, steps: int) -> tuple[float, float]:
        """Takes so many steps; seconds of wall and of process CPU per step."""
        with jax.set_mesh(self._mesh):
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(steps):
                self._state, metrics = self._step(self._state, self._batch)
            jax.block_until_ready((self._state, metrics))
        return (time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps


def medians(variants: Mapping[Any, CompiledStep], rounds: int, steps: int) -> dict[Any, tuple[float, float]]:
    """Median seconds of wall and process CPU per step of each variant; they take turns, so that noise is shared."""
    for variant in variants.values():
        variant.run(1)  # warms up
    times: dict[Any, list] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, variant in variants.items():
            times[name].append(variant.run(steps))
    return {name: tuple(statistics.median(column) for column in zip(*taken)) for name, taken in times.items()}
