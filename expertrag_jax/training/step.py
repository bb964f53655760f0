"""One training step: gradients of the trainable parameters, micro-batches, update; compiled with donated
state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from expertrag_jax import partitioning
from expertrag_jax.errors import UserError
from expertrag_jax.moe import balance
from expertrag_jax.systems.system import Loss, Metrics
from expertrag_jax.training import parameters
from expertrag_jax.training.optimizer import Scheduled
from expertrag_jax.training.state import TrainState

TrainStep = Callable[[TrainState, Any], tuple[TrainState, Metrics]]


def make_train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    trainable: Sequence[str] = (".*",),
    *,
    microbatches: int = 1,
    seed: int = 0,
    state_shardings: Any = None,
    donate: bool = True,
) -> TrainStep:
    """Makes the compiled step ``(state, batch) -> (state, metrics)``.

    Only the parameters that ``trainable`` matches are differentiated and have optimizer state. The step's
    random numbers are folded from (seed, state.step, micro-batch). A step whose loss or gradient is not
    finite leaves the state as it was, and its metrics say so: ``finite`` is (0, 1).

    Args:
      loss: see ``systems.system.Phase``.
      optimizer: over the flat dict of trainable parameters.
      trainable: patterns of parameter paths.
      microbatches: the batch is worked on in this many parts, one after the other, each weighted by the units
        of its loss. The gradient is the whole batch's where rows do not look at one another; routing groups, drops,
        balance losses and in-batch negatives are those of each part.
      seed: of the run.
      state_shardings: a TrainState of shardings that the new state keeps; None leaves it to the compiler.
      donate: give the old state's memory to the new one; the caller must not use the old one again.
    Returns:
      The step. Its metrics are the loss's, as (total, count), and ``objective``, ``finite``,
      ``gradient_norm``, ``update_norm``, ``parameter_norm`` (global L2 norms over the trainable parameters),
      ``learning_rate`` where the optimizer knows it (`optimizer.Scheduled`).
    """

    learning_rate = optimizer.learning_rate if isinstance(optimizer, Scheduled) else None

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        variables, frozen = parameters.split(state.params, trainable)
        rng = jax.random.fold_in(jax.random.key(seed), state.step)

        def objective(variables, batch, rng):
            return loss(parameters.join(variables, frozen), batch, rng)

        scalar, metrics, gradients = gradients_of(objective, variables, batch, rng, microbatches)
        gradients, load_errors = balance.take_errors(gradients)
        gradient_norm = optax.global_norm(gradients)
        finite = jnp.isfinite(scalar) & jnp.isfinite(gradient_norm)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer_state, variables)
        updates = balance.with_bias_steps(updates, load_errors)
        updated = optax.apply_updates(variables, updates)
        new_state = TrainState(
            step=state.step + 1,
            phase=state.phase,
            phase_step=state.phase_step + 1,
            params=parameters.join(updated, frozen),
            optimizer_state=optimizer_state,
        )
        new_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new_state, state)
        one = jnp.ones((), jnp.float32)
        return new_state, dict(metrics) | {
            "objective": (scalar, one),
            "finite": (finite.astype(jnp.float32), one),
            "gradient_norm": (gradient_norm, one),
            "update_norm": (optax.global_norm(updates), one),
            "parameter_norm": (optax.global_norm(updated), one),
            **({"learning_rate": (learning_rate(state.phase_step) * one, one)} if learning_rate else {}),
        }

    shardings = {}
    if state_shardings is not None:  # metrics go to every process
        everywhere = partitioning.replicated(jax.tree.leaves(state_shardings)[0].mesh)
        shardings = {"out_shardings": (state_shardings, everywhere)}
    return jax.jit(step, donate_argnums=(0,) if donate else (), **shardings)


def gradients_of(objective: Loss, variables: Any, batch: Any, rng: jax.Array, microbatches: int):
    """Objective, metrics and gradients of a batch: g = sum_i w_i g_i / sum_i w_i over its micro-batches i.

    w_i is the micro-batch's number of units, ``metrics["loss"][1]``: what a mean over all units gives. An
    objective that divides by a constant instead has a metric ``loss_normalizer``; then g = sum_i g_i.

    Returns:
      (scalar float32, metrics summed over micro-batches, gradients like ``variables``)
    """
    gradient = jax.value_and_grad(objective, has_aux=True)

    def units(metrics):
        return jnp.ones(()) if "loss_normalizer" in metrics else metrics["loss"][1]

    if microbatches == 1:
        (scalar, metrics), gradients = gradient(variables, batch, jax.random.fold_in(rng, 0))
        return scalar, metrics, gradients

    def part(batch_and_index):
        here, (batch, index) = variables, batch_and_index
        if partitioning.mesh_axis_sizes()["fsdp"] > 1:
            # Bound to the micro-batch, lest the compiler gather all parameters once, ahead of the loop, and keep them:
            # gathered where they are used, they are freed again.
            here, batch = jax.lax.optimization_barrier((variables, batch))
        (scalar, metrics), gradients = gradient(here, batch, jax.random.fold_in(rng, index))
        weight = units(metrics)
        # A micro-batch without units counts for nothing, even where its mean is 0 / 0.
        return jax.tree.map(lambda x: jnp.where(weight == 0, 0, x * weight), (scalar, gradients)), metrics

    def add(total, batch_and_index):
        return jax.tree.map(jnp.add, total, part(batch_and_index)), None

    parts = (split_batch(batch, microbatches), jnp.arange(microbatches))
    first = jax.tree.map(lambda x: x[0], parts)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(part, first))
    ((scalar, gradients), metrics), _ = jax.lax.scan(add, zeros, parts)
    weight = units(metrics)
    scale = jnp.where(weight == 0, 0, 1 / jnp.where(weight == 0, 1, weight))
    return scalar * scale, metrics, jax.tree.map(lambda x: x * scale, gradients)


def split_batch(batch: Any, microbatches: int) -> Any:
    """[B, ...] -> [microbatches, B / microbatches, ...]; micro-batch i holds the rows i, i + n, i + 2n, ...

    Strided, so that every device finds its part of every micro-batch among its own rows: nothing moves.

    Raises:
      UserError: B is not a multiple of ``microbatches`` times the batch shards; working on the whole batch
        instead would run out of memory where micro-batches were to save it.
    """
    sizes = partitioning.mesh_axis_sizes()
    shards = sizes["data"] * sizes["fsdp"] * sizes["expert"]

    def one(rows):
        if rows.shape[0] % (microbatches * shards):
            raise UserError(
                f"A batch of {rows.shape[0]} does not split into {microbatches} micro-batches over {shards} "
                f"batch shards: make BATCH_SIZE a multiple of {microbatches * shards}."
            )
        rows = rows.reshape(rows.shape[0] // microbatches, microbatches, *rows.shape[1:]).swapaxes(0, 1)
        return partitioning.constrain(rows, None, "batch", *[None] * (rows.ndim - 2))

    return jax.tree.map(one, batch)
