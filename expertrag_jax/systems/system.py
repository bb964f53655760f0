"""What the trainer knows about a system: how to make its parameters, how they are laid out, its phases.

A system (ExpertRAG, RAG, a closed-book T5, a dual encoder, ...) is one file beside this one. Training,
checkpoints and export work on this protocol and know nothing else about it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import optax

from expertrag_jax.systems.mark import Reached

Params = Mapping[str, Any]  # nested dict of float32 arrays
Metrics = Mapping[str, tuple[jax.Array, jax.Array]]  # name -> (total, count); the value is total / count
Loss = Callable[[Params, Any, jax.Array], tuple[jax.Array, Metrics]]


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of training with one loss, one trainable set of parameters and one optimizer.

    Attributes:
      name: names the phase's data set, its metrics and its place in the checkpoint.
      steps: optimizer steps; the largest number of them if ``until`` is given.
      loss: ``(params, batch, rng) -> (scalar, metrics)``. ``batch`` is any pytree whose leaves have the
        leading batch axis. The scalar is a mean over units (tokens, examples, ...) and ``metrics["loss"]`` is
        (sum, number of units); micro-batches are weighted by that number. A scalar that is a sum divided by
        a constant has a metric ``loss_normalizer``; its micro-batches are added. A metric may be an array:
        the load of each expert.
      optimizer: a gradient transformation, or a function without arguments that returns one. Its schedule
        counts the phase's own steps.
      trainable: regular expressions; a parameter trains when one of them matches its whole path, ``gate/.*``.
        All others are frozen: no gradient, no optimizer state.
      prepare: ``(params, batch) -> batch``, on the host before the step (hard negatives, fresh candidates), and before
        the phase's evaluation.
      before_checkpoint: ``(params) -> None``, on the host before each checkpoint of the phase is written: makes what
        the checkpoint's parameters need beside them.
      until: ends the phase before ``steps`` when a metric of its loss reaches a mark; None: it takes all ``steps``.
    """

    name: str
    steps: int
    loss: Loss
    optimizer: optax.GradientTransformation | Callable[[], optax.GradientTransformation]
    trainable: tuple[str, ...] = (".*",)
    prepare: Callable[[Params, Any], Any] | None = None
    before_checkpoint: Callable[[Params], None] | None = None
    until: Reached | None = None

    def make_optimizer(self) -> optax.GradientTransformation:
        """The gradient transformation; made now where ``optimizer`` is a factory."""
        made = isinstance(self.optimizer, optax.GradientTransformation)
        return self.optimizer if made else self.optimizer()


@runtime_checkable
class System(Protocol):
    """A trainable system.

    Attributes:
      phases: run in this order.
    """

    phases: tuple[Phase, ...]

    def init(self, rng: jax.Array) -> Params:
        """Fresh parameters, a plain nested dict of float32 arrays; traceable, so jit puts it on a mesh."""
        ...

    def logical_axes(self) -> Any:
        """The tree of ``init`` with a tuple of logical axis names (see ``partitioning``) at each leaf."""
        ...
