"""A retriever that learns from a reader which passages help (Atlas, arXiv 2208.03299, section 2.2).

A batch holds questions, their K candidates as reader inputs, the candidates' vectors and the answers. The reader, as
it is, judges the candidates; the query encoder moves until its scores agree. Passage vectors are the index's and stay
(query-side training, section 2.4): after training, build the index again with the new towers, or keep it.

Phases: *generator* trains the reader on the candidates (fusion-in-decoder), *retriever* the query encoder. A reader
from elsewhere comes through INITIAL_CHECKPOINT_PATH, with 0 steps for *generator*.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from expertrag_jax import registry
from expertrag_jax.batch import Batch
from expertrag_jax.errors import UserError
from expertrag_jax.model import fusion
from expertrag_jax.model.config import TransformerConfig
from expertrag_jax.model.dual_encoder import DualEncoderConfig, Tower
from expertrag_jax.model.transformer import Memory, Transformer
from expertrag_jax.ranges import Length, Natural, Positive, Rate, Weight, checked
from expertrag_jax.systems import generator
from expertrag_jax.systems.distillation_losses import LOSSES
from expertrag_jax.systems.expert_rag import GENERATOR_PARAMETERS, ExpertRAG
from expertrag_jax.systems.marginals import ABSENT, entropy, log_prior
from expertrag_jax.systems.system import Phase

Array = jax.Array


@registry.register("Distillation")
@checked
@dataclasses.dataclass(frozen=True)
class Distillation:
    """The system; parameters are the reader's at the root, ``query_encoder``, and ``passage_encoder`` if not shared.

    Attributes:
      model: the reader. retriever: the towers.
      signal: the loss: ``pdist``, ``emdr2``, ``loop`` or ``adist``; see ``distillation_losses``.
      temperature: divides the scores of unit vectors. target_temperature: of the reader's judgement.
      passage_vectors: rows [B, K] int32 -> [B, K, D] float32, looked up before each step; None: batches bring theirs.
      max_target_length, label_smoothing, z_loss, balance_loss_factor, router_z_loss_factor: as in ``ExpertRAG``.
      generator_steps, retriever_steps, generator_optimizer, retriever_optimizer: the phases.
    """

    model: TransformerConfig
    retriever: DualEncoderConfig
    signal: str = "pdist"
    temperature: Positive = 0.05
    target_temperature: Positive = 1.0
    passage_vectors: Callable[[np.ndarray], np.ndarray] | None = None
    max_target_length: Length = 16
    label_smoothing: Rate = 0.0
    z_loss: Weight = 1e-4
    balance_loss_factor: Weight = 0.01
    router_z_loss_factor: Weight = 0.0
    generator_steps: Natural = 1000
    retriever_steps: Natural = 500
    generator_optimizer: Callable[[], optax.GradientTransformation] = lambda: optax.adafactor(1e-3)
    retriever_optimizer: Callable[[], optax.GradientTransformation] = lambda: optax.adam(1e-4)

    def __post_init__(self):
        if self.signal not in LOSSES:
            raise UserError(f"SIGNAL is {self.signal!r}; it must be one of {', '.join(LOSSES)}.")

    @property
    def phases(self) -> tuple[Phase, ...]:
        """generator, then retriever."""
        prepare = None if self.passage_vectors is None else self.with_vectors
        reading, optimizer = self._reader.generator_loss, self.retriever_optimizer
        return (
            Phase("generator", self.generator_steps, reading, self.generator_optimizer, GENERATOR_PARAMETERS),
            Phase("retriever", self.retriever_steps, self.loss, optimizer, ("query_encoder/.*",), prepare),
        )

    # Parameters

    def init(self, rng: Array) -> dict:
        """Plain nested dict, float32."""
        return generator.plain(self._boxed(rng))

    def logical_axes(self) -> dict:
        """The tree of ``init`` with logical axis names."""
        return generator.axes_of(jax.eval_shape(self._boxed, jax.random.PRNGKey(0)))

    def _boxed(self, rng):
        names = ("query_encoder",) if self.retriever.shared else ("query_encoder", "passage_encoder")
        reader, *keys = jax.random.split(rng, 1 + len(names))
        tokens = jnp.ones((1, 8), jnp.int32)
        towers = {name: Tower(self.retriever).init(key, tokens)["params"] for name, key in zip(names, keys)}
        return dict(generator.initial_parameters(self.model, reader)) | towers

    @property
    def _reader(self) -> ExpertRAG:
        return ExpertRAG(
            model=self.model,
            max_target_length=self.max_target_length,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            balance_loss_factor=self.balance_loss_factor,
            router_z_loss_factor=self.router_z_loss_factor,
        )

    # The retriever learns

    def with_vectors(self, params, batch: Batch) -> Batch:
        """The batch with the stored vectors of its candidates, float32 [B, K, D]; on the host."""
        del params
        return batch.replace(passage_vectors=self.passage_vectors(np.asarray(batch.passage_rows)))

    def loss(self, params, batch: Batch, rng: Array | None):
        """Mean over questions of ``signal``'s loss; rows without an answer or without a candidate count for nothing.

        Logged beside it: ``agreement``, how often retriever and reader have the same best candidate, and
        ``target_entropy`` of the reader's distribution, in nats.
        """
        present = (batch.passage_tokens > 0).any(-1)
        judgement = jax.lax.stop_gradient(self.judgement(params, batch))
        scores = self.scores(params, batch, rng)
        losses = LOSSES[self.signal](scores, judgement, present, self.temperature, self.target_temperature)
        weights = ((batch.decoder_loss_weights > 0).any(-1) & present.any(-1)).astype(jnp.float32)
        units, total = weights.sum(), (losses * weights).sum()
        helps = -judgement if self.signal == "loop" else judgement
        target = log_prior(helps, present, self.target_temperature)
        same = jnp.argmax(jnp.where(present, scores, ABSENT), -1) == jnp.argmax(target, -1)
        metrics = {
            "loss": (total, units),
            "agreement": ((same * weights).sum(), units),
            "target_entropy": ((entropy(target) * weights).sum(), units),
        }
        return total / jnp.maximum(units, 1.0), metrics

    def scores(self, params, batch: Batch, rng: Array | None = None) -> Array:
        """d(z).q(x) of the candidates, [B, K] float32; gradients reach the query encoder alone.

        Raises:
          UserError: the batch has no passage vectors.
        """
        if batch.passage_vectors is None:
            raise UserError(
                "Learning to retrieve from a reader needs the vectors of the candidates: bind passage_vectors to the "
                "index (see systems/distillation.gin)."
            )
        rngs = None if rng is None else {"dropout": rng}
        tower = Tower(self.retriever)
        queries = tower.apply({"params": params["query_encoder"]}, batch.query_tokens, rng is None, rngs=rngs)
        return jnp.einsum("bd,bkd->bk", queries, batch.passage_vectors)

    # The reader judges

    def judgement(self, params, batch: Batch) -> Array:
        """What ``signal`` takes of the reader, [B, K] float32; without dropout, jitter or dropped tokens."""
        if self.signal == "loop":
            return self.likelihoods_without(params, batch)
        return self.attention(params, batch) if self.signal == "adist" else self.likelihoods(params, batch)

    def likelihoods(self, params, batch: Batch) -> Array:
        """log p(y|x,z) of each passage read alone: [B, K] float32, nats. Decoded passage after passage."""
        states, mask = self._encoded(params, batch)

        def reading(passage):
            memory, _ = generator.apply(self.model, params, *passage, method="memory")
            return self._log_likelihood(params, batch, memory)

        return jax.lax.map(reading, (states.swapaxes(0, 1), mask.swapaxes(0, 1))).T

    def likelihoods_without(self, params, batch: Batch) -> Array:
        """log p(y|x, all passages but z): [B, K] float32, nats; K readings of K - 1 passages, encoded once.

        A passage that is not there is left out already: without it, nothing changes.
        """
        memory, place = self._joint_memory(params, batch)

        def reading(left_out):
            return self._log_likelihood(params, batch, memory.replace(mask=memory.mask & (place != left_out)))

        return jax.lax.map(reading, jnp.arange(batch.passage_tokens.shape[1])).T

    def attention(self, params, batch: Batch) -> Array:
        """Cross-attention on each of K passages read together, weighted by the length of value vectors: [B, K] float32.

        Summed over a passage's tokens, averaged over heads, layers and answer tokens.
        """
        memory, _ = self._joint_memory(params, batch)
        segments = (batch.decoder_target_tokens > 0).astype(jnp.int32)
        _, sown = Transformer(self.model).apply(
            {"params": params}, batch.decoder_input_tokens, segments, memory, method="logits", mutable=["relevance"]
        )
        found = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(sown) if _across(path)]
        layers = jnp.concatenate([leaf.reshape(-1, *leaf.shape[-3:]) for leaf in found])  # [N, B, T, K P]
        weights = batch.decoder_loss_weights
        each = jnp.einsum("nbtm,bt->bm", layers, weights) / (len(layers) * jnp.maximum(weights.sum(-1), 1.0))[:, None]
        return each.reshape(*batch.passage_tokens.shape).sum(-1)

    def _encoded(self, params, batch):
        count, passages, length = batch.passage_tokens.shape
        tokens = fusion.fold_passages(batch.passage_tokens)
        states, _ = generator.apply(self.model, params, tokens, None, True, method="encode")
        return states.reshape(count, passages, length, -1), batch.passage_tokens > 0

    def _joint_memory(self, params, batch) -> tuple[Memory, Array]:
        """The memory of all passages together, and the passage that each of its places [K * P] belongs to."""
        states, mask = self._encoded(params, batch)
        count, passages, length, width = states.shape
        joint = (states.reshape(count, -1, width), mask.reshape(count, -1))
        memory, _ = generator.apply(self.model, params, *joint, method="memory")
        return memory, jnp.repeat(jnp.arange(passages), length)

    def _log_likelihood(self, params, batch, memory) -> Array:
        losses, _, _ = generator.target_loss(self.model, params, batch, memory)
        return -(losses * batch.decoder_loss_weights).sum(-1)


def _across(path) -> bool:
    return any("encoder_decoder_attention" in str(key) for key in path)
