"""The closed-book baseline (arXiv 2002.08910): a T5, dense or sparse, that answers from its parameters alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import optax

from expertrag_jax.batch import Batch
from expertrag_jax.model.config import TransformerConfig
from expertrag_jax.systems import generator
from expertrag_jax.systems.expert_rag import ExpertRAG
from expertrag_jax.systems.system import Phase


@dataclasses.dataclass(frozen=True)
class ClosedBook:
    """Fields as in ``ExpertRAG``; one phase, no gate, no retriever.

    ``steps`` and ``optimizer`` are the phase's.
    """

    model: TransformerConfig
    max_target_length: int = 16
    label_smoothing: float = 0.0
    z_loss: float = 1e-4
    balance_loss_factor: float = 0.01
    router_z_loss_factor: float = 0.0
    loss_normalizing_factor: float | None = None
    steps: int = 1000
    optimizer: Callable[[], optax.GradientTransformation] = lambda: optax.adafactor(1e-3)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """One phase called ``generator``."""
        return (Phase("generator", self.steps, self.loss, self.optimizer),)

    def init(self, rng: jax.Array) -> dict:
        """The generator's tree, float32."""
        return generator.plain(generator.initial_parameters(self.model, rng))

    def logical_axes(self) -> dict:
        """The tree of ``init`` with logical axis names."""
        return generator.axes_of(jax.eval_shape(lambda rng: generator.initial_parameters(self.model, rng), jax.random.PRNGKey(0)))

    def loss(self, params, batch: Batch, rng: jax.Array):
        """Cross-entropy per target token plus the router's losses."""
        return self._reader.generator_loss(params, batch.replace(passage_tokens=None), rng)

    @property
    def _reader(self) -> ExpertRAG:
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if hasattr(ExpertRAG, field.name)}
        shared.pop("phases", None)
        return ExpertRAG(model=self.model, **shared)
