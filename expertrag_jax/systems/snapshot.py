"""A copy of a part of the parameters, taken anew every so many steps, inside the parameters themselves.

Candidates are searched with the query encoder as it was at the last refresh. The copy is a part of the tree, made by
the optimizer's update, so a resumed run searches with the same encoder and many processes need no exchange.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

SNAPSHOT = "candidate_encoder"  # {"encoder": the copy, "refreshes": [1] float32, how often it was taken}


class SnapshotState(NamedTuple):
    """State of the optimizer proper, and the number of updates so far."""

    inner: Any
    count: jax.Array


def with_snapshot(inner: optax.GradientTransformation, subtree: str, period: int) -> optax.GradientTransformation:
    """``inner``, and ``candidate_encoder/encoder`` becomes ``subtree`` as it is after every ``period``-th update.

    After the very first update it becomes ``subtree`` as it was before: what a checkpoint had put there. So the batch
    of step s (from 0) is prepared with the copy of step s - s mod period, where step 0's is ``subtree`` itself.

    Args:
      inner: over a flat dict of parameters by path, to which the copy's leaves do not belong.
      period: in updates, at least 1.
    """

    def own(flat):
        return {name: value for name, value in flat.items() if not name.startswith(f"{SNAPSHOT}/")}

    def init(variables):
        return SnapshotState(inner.init(own(variables)), jnp.zeros((), jnp.int32))

    def update(gradients, state, variables):
        updates, inner_state = inner.update(own(gradients), state.inner, own(variables))
        due = (state.count + 1) % period == 0
        taken = due | (state.count == 0)
        copies = {}
        for name, old in variables.items():
            if name == f"{SNAPSHOT}/refreshes":
                copies[name] = jnp.full_like(old, taken)
            elif name.startswith(f"{SNAPSHOT}/"):
                source = name.replace(f"{SNAPSHOT}/encoder", subtree, 1)
                now = variables[source] + jnp.where(due, updates[source], 0.0)
                copies[name] = jnp.where(taken, now - old, 0.0)
        return dict(updates) | copies, SnapshotState(inner_state, state.count + 1)

    made = optax.GradientTransformation(init, update)
    rate = getattr(inner, "learning_rate", None)  # a training.optimizer.Scheduled stays one
    return made if rate is None else type(inner)(made, rate)
