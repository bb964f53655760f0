"""The closed-book baseline (arXiv 2002.08910): a T5, dense or sparse, that answers from its parameters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from expertrag_jax import registry
from expertrag_jax.batch import Batch
from expertrag_jax.model.config import TransformerConfig
from expertrag_jax.model.transformer import DecoderCache, Memory
from expertrag_jax.ranges import Length, Natural, Positive, Rate, Weight, checked
from expertrag_jax.systems import generator
from expertrag_jax.systems.expert_rag import ExpertRAG, Question
from expertrag_jax.systems.system import Phase


@registry.register("ClosedBook")
@checked
@dataclasses.dataclass(frozen=True)
class ClosedBook:
    """The closed-book arm of ``ExpertRAG`` alone; no gate, no retriever.

    Attributes:
      model, max_target_length, label_smoothing, z_loss, balance_loss_factor, router_z_loss_factor,
        loss_normalizing_factor: as in ``ExpertRAG``.
      steps, optimizer: of the one phase.
    """

    model: TransformerConfig
    max_target_length: Length = 16
    label_smoothing: Rate = 0.0
    z_loss: Weight = 1e-4
    balance_loss_factor: Weight = 0.01
    router_z_loss_factor: Weight = 0.0
    loss_normalizing_factor: Positive | None = None
    steps: Natural = 1000
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
        initial = functools.partial(generator.initial_parameters, self.model)
        return generator.axes_of(jax.eval_shape(initial, jax.random.PRNGKey(0)))

    def loss(self, params, batch: Batch, rng: jax.Array):
        """Cross-entropy per target token plus the router's losses; passages are not looked at."""
        return self._arm.generator_loss(params, batch.replace(passage_tokens=None), rng)

    def encode_question(self, params, question_tokens: jax.Array) -> Question:
        """Question tokens [B, L] int32 -> Question."""
        return self._arm.encode_question(params, question_tokens)

    def decide(self, params, question: Question) -> jax.Array:
        """p_ret [B] float32: it never retrieves."""
        return jnp.zeros(question.features.shape[0])

    def begin(self, params, memory: Memory) -> tuple[jax.Array, DecoderCache]:
        """First decoder step over a memory: ([B, V] log-probabilities, cache)."""
        return self._arm.begin(params, memory)

    def decode_step(self, params, memory: Memory, cache: DecoderCache, tokens: jax.Array):
        """tokens [B] int32 -> ([B, V] log-probabilities, cache)."""
        return self._arm.decode_step(params, memory, cache, tokens)

    @property
    def _arm(self) -> ExpertRAG:
        return ExpertRAG(
            model=self.model,
            max_target_length=self.max_target_length,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            balance_loss_factor=self.balance_loss_factor,
            router_z_loss_factor=self.router_z_loss_factor,
            loss_normalizing_factor=self.loss_normalizing_factor,
        )
