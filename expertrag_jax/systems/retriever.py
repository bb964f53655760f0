"""The retriever: a dual encoder trained on in-batch and hard negatives (DPR, arXiv 2004.04906).

Batch: ``query_tokens`` [B, Lq], ``passage_tokens`` [B, K, S] without the question, the positive first, and, where they
are of a corpus, their ``passage_rows`` [B, K]. Every passage of the (global) batch is a candidate for every question.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from expertrag_jax import registry
from expertrag_jax.batch import Batch
from expertrag_jax.model.dual_encoder import DualEncoderConfig, Tower
from expertrag_jax.ranges import Natural, Positive, checked
from expertrag_jax.systems import generator
from expertrag_jax.systems.system import Phase

Array = jax.Array


@registry.register("DualEncoder")
@checked
@dataclasses.dataclass(frozen=True)
class DualEncoder:
    """The system; parameters are ``query_encoder`` and, when the towers are not shared, ``passage_encoder``.

    Attributes:
      config: the towers. temperature: divides scores of unit vectors.
      steps, optimizer: the one phase ``retriever``.
    """

    config: DualEncoderConfig
    temperature: Positive = 0.05
    steps: Natural = 500
    optimizer: Callable[[], optax.GradientTransformation] = lambda: optax.adam(1e-3)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """One phase called ``retriever``."""
        return (Phase("retriever", self.steps, self.loss, self.optimizer),)

    def init(self, rng: Array) -> dict:
        """Plain nested dict, float32."""
        return generator.plain(self._boxed(rng))

    def logical_axes(self) -> dict:
        """The tree of ``init`` with logical axis names."""
        return generator.axes_of(jax.eval_shape(self._boxed, jax.random.PRNGKey(0)))

    def _boxed(self, rng):
        names = ("query_encoder",) if self.config.shared else ("query_encoder", "passage_encoder")
        tokens = jnp.ones((1, 8), jnp.int32)
        keys = jax.random.split(rng, len(names))
        return {name: Tower(self.config).init(key, tokens)["params"] for name, key in zip(names, keys)}

    def encode_queries(self, params, tokens: Array, rng: Array | None = None) -> Array:
        """[B, Lq] int32 -> [B, D] float32 unit vectors."""
        return self._encode(params["query_encoder"], tokens, rng)

    def encode_passages(self, params, tokens: Array, rng: Array | None = None) -> Array:
        """[N, S] int32 -> [N, D] float32 unit vectors."""
        return self._encode(params["query_encoder" if self.config.shared else "passage_encoder"], tokens, rng)

    def _encode(self, params, tokens, rng):
        rngs = None if rng is None else {"dropout": rng}
        return Tower(self.config).apply({"params": params}, tokens, rng is None, rngs=rngs)

    def loss(self, params, batch: Batch, rng: Array | None):
        """Mean over questions of -log softmax over all passages of the batch at the question's positive.

        Another copy of the question's positive is no negative: its score is masked, where its tokens are the same or,
        with ``batch.passage_rows``, its row is (inverse cloze takes another sentence out of each copy). Rows without a
        question or without a positive are padding and count for nothing.
        """
        query_rng, passage_rng = (None, None) if rng is None else jax.random.split(rng)
        count, per_question, length = batch.passage_tokens.shape
        flat = batch.passage_tokens.reshape(-1, length)
        queries = self.encode_queries(params, batch.query_tokens, query_rng)
        scores = queries @ self.encode_passages(params, flat, passage_rng).T
        own = jnp.arange(count) * per_question
        marks = fingerprint(flat)
        absent = (flat == 0).all(-1)
        hidden = (marks[own][:, None] == marks[None, :]) | absent[None, :]
        if batch.passage_rows is not None:
            rows = batch.passage_rows.reshape(-1)
            hidden |= rows[own][:, None] == rows[None, :]
        hidden &= jnp.arange(flat.shape[0])[None, :] != own[:, None]
        scores = jnp.where(hidden, -1e9, scores / self.temperature)
        losses = -jnp.take_along_axis(jax.nn.log_softmax(scores, axis=-1), own[:, None], axis=1)[:, 0]
        weights = ((batch.query_tokens > 0).any(-1) & ~absent[own]).astype(jnp.float32)
        units = weights.sum()
        total = (losses * weights).sum()
        right = ((jnp.argmax(scores, -1) == own) * weights).sum()
        return total / jnp.maximum(units, 1.0), {"loss": (total, units), "in_batch_accuracy": (right, units)}


def fingerprint(tokens: Array) -> Array:
    """A 32-bit hash per row: [N, S] int32 -> [N] uint32; MurmurHash3's finaliser over (position, token)."""
    position = jnp.arange(tokens.shape[-1], dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
    mixed = tokens.astype(jnp.uint32) + position
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return (mixed ^ (mixed >> 16)).sum(-1, dtype=jnp.uint32)
