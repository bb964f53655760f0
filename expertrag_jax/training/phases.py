"""The phases of a run: checked before anything is computed, entered in order, found again after a restart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from expertrag_jax import partitioning
from expertrag_jax.data.interleave import check_all
from expertrag_jax.errors import UserError
from expertrag_jax.systems.system import Phase
from expertrag_jax.training import parameters
from expertrag_jax.training.mastery import Mastery
from expertrag_jax.training.state import Layout, TrainState


def check(phases: Sequence[Phase], datasets: Mapping[str, Callable], params: Any) -> None:
    """Every phase has its own name, steps, data, and patterns that match.

    Raises:
      UserError: naming the phase and what it lacks.
    """
    names = [phase.name for phase in phases]
    if len(set(names)) != len(names) or not names:
        raise UserError(f"Phases {names}: at least one, and each with its own name.")
    check_steps(phases)
    for phase in phases:
        if phase.name not in datasets:
            raise UserError(
                f"Phase '{phase.name}' has no data set; there are {', '.join(datasets) or 'none'}."
            )
        parameters.trainable_names(params, phase.trainable)


def to_come(phases: Sequence[Phase], state: TrainState, mastery: Mastery) -> list[Phase]:
    """The phases that have steps left."""
    current, *later = phases[int(state.phase) :]
    over = int(state.phase_step) >= current.steps or mastery.finished(current.name)
    return ([] if over else [current]) + [phase for phase in later if phase.steps]


def check_data(phases: Sequence[Phase], datasets: Mapping[str, Callable], hooks: Sequence[Any]) -> None:
    """Lets each data set that has a ``check``, and the hooks of these phases, read what they serve: no phase is trained
    in vain."""
    served = [datasets[phase.name] for phase in phases]
    check_all(list({id(dataset): dataset for dataset in served}.values()))  # each once, if phases share one
    for hook in hooks:
        if any(hook.phase in (None, phase.name) for phase in phases):
            hook.check()


def check_steps(phases: Sequence[Phase]) -> None:
    """UserError where a phase's steps are no whole number from 0."""
    for phase in phases:
        if not isinstance(phase.steps, int) or phase.steps < 0:
            raise UserError(f"Phase '{phase.name}' has {phase.steps!r} steps; give a whole number, 0 or more.")


def locate(phases: Sequence[Phase], name: str) -> int:
    """Index of the phase that a checkpoint was written in; UserError where it is gone."""
    for index, phase in enumerate(phases):
        if phase.name == name:
            return index
    raise UserError(
        f"The checkpoint was written in phase '{name}' and the run has {', '.join(p.name for p in phases)}: "
        "train in another MODEL_DIR, or start from it with INITIAL_CHECKPOINT_PATH."
    )


def enter(params: Any, step: int, index: int, phase: Phase, layout: Layout) -> TrainState:
    """The state at a phase's first step: the parameters as they are, and a new optimizer state."""
    trainable, _ = parameters.split(params, phase.trainable)
    optimizer = phase.make_optimizer()
    places = layout.optimizer_shardings(jax.eval_shape(optimizer.init, trainable))
    counter = partitioning.replicated(layout.mesh)
    counters = jax.jit(lambda: jnp.array([step, index, 0], jnp.int32), out_shardings=counter)()
    return TrainState(
        step=counters[0],
        phase=counters[1],
        phase_step=counters[2],
        params=params,
        optimizer_state=jax.jit(optimizer.init, out_shardings=places)(trainable),
    )
