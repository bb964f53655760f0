"""ExpertRAG (arXiv 2504.08744): a mixture-of-experts reader and a gate that decides per question to retrieve.

Training runs in two phases (section 3.6). *generator*: cross-entropy on answers, closed book and open book in
turn (a batch with passages is read, a batch without is answered from memory). *gate*: the generator is
frozen; the gate maximises expected utility, because both arms, with and without evidence, can be evaluated.

Answering (algorithm 1): ``encode_question`` and ``decide`` run for every question, ``read`` only for those
that retrieve; ``decode_step`` continues either. A question that skips retrieval keeps the decoder step that
the gate looked at.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import struct

from expertrag_jax import registry
from expertrag_jax.batch import Batch
from expertrag_jax.errors import UserError
from expertrag_jax.gate import network, objective
from expertrag_jax.model import fusion
from expertrag_jax.model.config import TransformerConfig
from expertrag_jax.model.dual_encoder import DualEncoderConfig, Tower
from expertrag_jax.model.transformer import DecoderCache, Memory
from expertrag_jax.ranges import Length, Natural, Number, Positive, Rate, Weight, checked
from expertrag_jax.systems import generator
from expertrag_jax.systems.system import Phase

Array = jax.Array
GENERATOR_PARAMETERS = ("(token_embedder|encoder|decoder|fusion)/.*",)
GATE_OBJECTIVES = ("utility", "supervised")


@struct.dataclass
class Question:
    """What is known of B questions before retrieving.

    Attributes:
      memory: the closed-book Memory. first_log_probs: [B, V] float32, closed-book decoder, first step.
      cache: DecoderCache behind that step. features: [B, D + 2] float32, what the gate reads.
    """

    memory: Memory
    first_log_probs: Array
    cache: DecoderCache
    features: Array


@struct.dataclass
class GateExamples:
    """Both arms of B questions, measured once with a frozen generator.

    Attributes:
      features: [B, F] float32. gain: [B] float32, utility with evidence minus without; NaN where unknown.
      retrieval_needed: [B] float32, 1 where only evidence gave the right answer; NaN where unknown.
    """

    features: Array
    gain: Array
    retrieval_needed: Array


@registry.register("ExpertRAG")
@checked
@dataclasses.dataclass(frozen=True)
class ExpertRAG:
    """The system; every field is a gin value.

    Attributes:
      model: the generator.
      retriever: its query encoder (kept in this tree so that one export answers), or None.
      fusion: ``per_passage`` (fusion-in-decoder), ``concatenate`` (the paper's form; K = 1 long input) or
        ``augment``.
      max_target_length: tokens of an answer, EOS included.
      label_smoothing, z_loss, balance_loss_factor, router_z_loss_factor: T5X's meanings.
      loss_normalizing_factor: see ``generator.loss_and_metrics``.
      gate_hidden: width of the gate's hidden layer (0: the paper's linear gate). gate_dropout: on its inputs.
      gate_objective: ``utility`` (both arms) or ``supervised`` (retrieval_needed).
      retrieval_cost: price of one retrieval in units of utility.
      gate_temperature: weight of the entropy bonus.
      gain_kind: ``likelihood`` (probability of the answer) or ``log_likelihood``.
      generator_steps, gate_steps, generator_optimizer, gate_optimizer: the phases.
    """

    model: TransformerConfig
    retriever: DualEncoderConfig | None = None
    fusion: str = "per_passage"
    max_target_length: Length = 16
    label_smoothing: Rate = 0.0
    z_loss: Weight = 1e-4
    balance_loss_factor: Weight = 0.01
    router_z_loss_factor: Weight = 0.0
    loss_normalizing_factor: Positive | None = None
    gate_hidden: Natural = 32
    gate_dropout: Rate = 0.0
    gate_objective: str = "utility"
    retrieval_cost: Number = 0.05
    gate_temperature: Weight = 0.1
    gain_kind: str = "likelihood"
    generator_steps: Natural = 1000
    gate_steps: Natural = 300
    generator_optimizer: Callable[[], optax.GradientTransformation] = lambda: optax.adafactor(1e-3)
    gate_optimizer: Callable[[], optax.GradientTransformation] = lambda: optax.adam(1e-3)

    def __post_init__(self):
        if self.fusion not in fusion.FUSIONS:
            raise UserError(f"FUSION is {self.fusion!r}; it must be one of {', '.join(fusion.FUSIONS)}.")
        if self.gate_objective not in GATE_OBJECTIVES:
            raise UserError(
                f"gate_objective is {self.gate_objective!r}; it must be one of {', '.join(GATE_OBJECTIVES)}."
            )
        if self.gain_kind not in objective.GAINS:
            raise UserError(
                f"gain_kind is {self.gain_kind!r}; it must be one of {', '.join(objective.GAINS)}."
            )

    @property
    def phases(self) -> tuple[Phase, ...]:
        """generator, then gate."""
        return (
            Phase(
                "generator",
                self.generator_steps,
                self.generator_loss,
                self.generator_optimizer,
                GENERATOR_PARAMETERS,
            ),
            Phase("gate", self.gate_steps, self.gate_loss, self.gate_optimizer, (network.TRAINABLE,)),
        )

    # Parameters

    def init(self, rng: Array) -> dict:
        """Generator at the root, ``gate``, ``query_encoder``, ``fusion`` beside it; float32."""
        return generator.plain(self._boxed(rng)) | {"gate": self._gate_parameters(rng)}

    def logical_axes(self) -> dict:
        """The tree of ``init`` with logical axis names."""
        boxed = jax.eval_shape(self._boxed, jax.random.PRNGKey(0))
        return generator.axes_of(boxed) | {"gate": network.logical_axes(self.gate_hidden)}

    def _boxed(self, rng):
        keys = jax.random.split(rng, 3)
        params = dict(generator.initial_parameters(self.model, keys[0]))
        if self.retriever is not None:
            tokens = jnp.ones((1, 8), jnp.int32)
            params["query_encoder"] = Tower(self.retriever).init(keys[1], tokens)["params"]
        if self.fusion == "augment":
            vectors = jnp.ones((1, 1, self.model.embed_dim))
            present = jnp.ones((1, 1), bool)
            params["fusion"] = self._augmentation.init(keys[2], vectors[0], vectors, present)["params"]
        return params

    def _gate_parameters(self, rng):
        features = jnp.zeros((1, self.model.embed_dim + network.UNCERTAINTY_FEATURES))
        return self._gate.init(jax.random.fold_in(rng, 1), features)["params"]

    @property
    def _gate(self):
        return network.GateNetwork(
            hidden=self.gate_hidden, dropout_rate=self.gate_dropout, dropout_width=self.model.embed_dim
        )

    @property
    def _augmentation(self):
        return fusion.Augmentation(self.model.embed_dim)

    # The two arms

    def encode_question(self, params, question_tokens: Array) -> Question:
        """Question tokens [B, L] int32 -> Question; the closed-book arm up to the first decoder step."""
        states, _ = generator.apply(self.model, params, question_tokens, method="encode")
        mask = question_tokens > 0
        memory, _ = generator.apply(self.model, params, states, mask, method="memory")
        first, cache = generator.begin(self.model, params, memory, self.max_target_length, mask.any(-1))
        features = network.gate_features(fusion.mean_pool(states, mask), first)
        return Question(memory, first, cache, features)

    def decide(self, params, question: Question) -> Array:
        """p_ret [B] float32, calibrated: sigma(w . h_q) of section 3.2, uncertainty among the features."""
        logit = self._gate.apply({"params": params["gate"]}, question.features)
        return network.retrieval_probability(params["gate"], logit)

    def query_vectors(self, params, query_tokens: Array) -> Array:
        """Questions in the retriever's vocabulary [B, Lq] int32 -> [B, D] float32."""
        return Tower(self.retriever).apply({"params": params["query_encoder"]}, query_tokens)

    def read(self, params, passage_tokens: Array, question_tokens: Array | None = None, rng=None) -> Memory:
        """Reader inputs [B, K, P] int32 (question included) -> Memory.

        Args:
          question_tokens: [B, L] int32; only ``augment`` needs them.
        Raises:
          UserError: fusion is ``concatenate`` and K is not 1.
        """
        return self._read(params, passage_tokens, question_tokens, rng)[0]

    def begin(self, params, memory: Memory) -> tuple[Array, DecoderCache]:
        """First decoder step over a memory: ([B, V] log-probabilities, cache)."""
        return generator.begin(self.model, params, memory, self.max_target_length, memory.mask.any(-1))

    def decode_step(self, params, memory: Memory, cache: DecoderCache, tokens: Array):
        """tokens [B] int32 -> ([B, V] log-probabilities, cache)."""
        return generator.decode_step(self.model, params, memory, cache, tokens)

    def _read(self, params, passage_tokens, question_tokens, rng):
        passages = passage_tokens.shape[1]
        if self.fusion == "concatenate" and passages != 1:
            raise UserError(
                f"FUSION is 'concatenate', which reads one input of all passages, but passage_tokens hold "
                f"{passages} per question."
            )
        folded = fusion.fold_passages(passage_tokens)
        states, router = self._encode(params, folded, None, rng)
        mask = passage_tokens.reshape(passage_tokens.shape[0], -1) > 0
        if self.fusion == "augment":
            pooled = fusion.mean_pool(states, folded > 0).reshape(-1, passages, states.shape[-1])
            rng = None if rng is None else jax.random.fold_in(rng, 1)
            asked, question_router = self._encode(params, question_tokens, None, rng)
            router = (router, question_router)
            mask = question_tokens > 0
            fused = self._augmentation.apply(
                {"params": params["fusion"]},
                fusion.mean_pool(asked, mask),
                pooled,
                (passage_tokens > 0).any(-1),
            )
            states = jnp.concatenate([fused[:, None].astype(asked.dtype), asked], axis=1)
            mask = jnp.concatenate([mask.any(-1, keepdims=True), mask], axis=1)
        else:
            states = fusion.unfold_passages(states, passages)
        memory, _ = generator.apply(self.model, params, states, mask, method="memory")
        return memory, router

    def _encode(self, params, tokens, segments, rng):
        return generator.apply(self.model, params, tokens, segments, rng is None, method="encode", rng=rng)

    def _closed(self, params, batch, rng):
        tokens, segments = batch.encoder_input_tokens, batch.encoder_segment_ids
        states, router = self._encode(params, tokens, segments, rng)
        mask = tokens > 0 if segments is None else segments
        memory, _ = generator.apply(self.model, params, states, mask, method="memory")
        return memory, router

    # Losses

    def generator_loss(self, params, batch: Batch, rng: Array):
        """Cross-entropy per target token plus the router's losses; reads the batch's passages, if any."""
        return self._loss(params, batch, rng)

    def evaluation_loss(self, params, batch: Batch):
        """The same without dropout, jitter or dropped tokens."""
        return self._loss(params, batch, None)

    def _loss(self, params, batch, rng):
        encode_rng, decode_rng = (None, None) if rng is None else jax.random.split(rng)
        if batch.passage_tokens is None:
            memory, encoder_router = self._closed(params, batch, encode_rng)
        else:
            memory, encoder_router = self._read(
                params, batch.passage_tokens, batch.encoder_input_tokens, encode_rng
            )
        losses, logits, decoder_router = generator.target_loss(
            self.model,
            params,
            batch,
            memory,
            rng=decode_rng,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
        )
        extra, metrics = generator.router_losses(
            (encoder_router, decoder_router), self.balance_loss_factor, self.router_z_loss_factor
        )
        return generator.loss_and_metrics(losses, logits, batch, extra, metrics, self.loss_normalizing_factor)

    def both_arms(self, params, batch: Batch) -> tuple[GateExamples, Array, Array]:
        """Evaluates both arms of a both-arms batch with the generator as it is.

        Returns:
          (GateExamples, closed-book and open-book negative log-likelihood of the answer, each [B] float32
          nats)
        """
        question = self.encode_question(params, batch.encoder_input_tokens)
        read = self.read(params, batch.passage_tokens, batch.encoder_input_tokens)
        closed_nll, open_nll = (
            (generator.target_loss(self.model, params, batch, memory)[0] * batch.decoder_loss_weights).sum(-1)
            for memory in (question.memory, read)
        )
        needed = batch.retrieval_needed
        if needed is None:
            needed = jnp.full(closed_nll.shape, jnp.nan)
        gain = objective.gain_from_losses(closed_nll, open_nll, self.gain_kind)
        return GateExamples(question.features, gain, needed), closed_nll, open_nll

    def gate_loss(self, params, batch: GateExamples | Batch, rng: Array):
        """The gate's objective on measured arms, or on a both-arms Batch, whose arms then run in the step."""
        examples = batch
        if isinstance(batch, Batch):
            examples = jax.lax.stop_gradient(self.both_arms(params, batch)[0])
        logit = self._gate.apply(
            {"params": params["gate"]},
            examples.features,
            deterministic=rng is None,
            rngs=None if rng is None else {"dropout": rng},
        )
        if self.gate_objective == "supervised":
            total, count = objective.supervised_bce(logit, examples.retrieval_needed)
        else:
            total, count = objective.expected_utility_loss(
                logit, examples.gain, self.retrieval_cost, self.gate_temperature
            )
        rate = jax.nn.sigmoid(logit)
        metrics = {"loss": (total, count), "gate/rate": (rate.sum(), jnp.asarray(float(rate.shape[0])))}
        return total / jnp.maximum(count, 1.0), metrics
