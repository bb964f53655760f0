"""RAG (Lewis et al. 2020, arXiv 2005.11401): the retrieved passage is a latent variable, summed out.

A question x has K candidate passages z with frozen vectors d(z). The prior is the retriever's softmax over them
(section 2.2), the likelihood a T5-style generator that reads question and passage together (2.3), and the loss
-log p(y|x) trains generator and query encoder at once (2.4): no label says which passage is right.

    p(z|x)     = softmax_z( d(z) . q(x) / temperature )
    sequence:  p(y|x) = sum_z p(z|x) prod_i p(y_i|x, z, y_<i)
    token:     p(y|x) = prod_i sum_z p(z|x) p(y_i|x, z, y_<i)

Where ``null_document`` is set, one more passage says nothing: the generator reads the question alone, and its vector is
learned (REALM, arXiv 2002.08909, section 3.3). Decoding (2.5) is in ``rag_decoding``; the sums are in ``marginals``.

Shapes: B questions, K passages (the null document included), P reader input, T target, V vocabulary, D query vector.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from flax import struct

from expertrag_jax import registry
from expertrag_jax.batch import Batch
from expertrag_jax.errors import UserError
from expertrag_jax.model import fusion
from expertrag_jax.model.config import TransformerConfig
from expertrag_jax.model.dual_encoder import DualEncoderConfig, Tower
from expertrag_jax.model.transformer import DecoderCache, Memory, empty_cache
from expertrag_jax.ranges import Count, Length, Natural, Positive, Rate, Weight, checked
from expertrag_jax.systems import generator, marginals, rag_decoding
from expertrag_jax.systems.snapshot import SNAPSHOT, with_snapshot
from expertrag_jax.systems.system import Phase

Array = jax.Array
MARGINALS = ("sequence", "token")
DECODINGS = ("greedy", "beam", "thorough", "fast")
TRAINABLE = ("(token_embedder|encoder|decoder|query_encoder)/.*",)


@struct.dataclass
class Documents:
    """The latent variable's values.

    Attributes:
      memory: cross-attention keys and values of B * K rows, row b * K + k: every passage by itself, computed once.
      log_prior: [B, K] float32, log p(z|x); ``marginals.ABSENT`` where there is no passage.
    """

    memory: Memory
    log_prior: Array


@struct.dataclass
class Cache:
    """What decoding knows after some tokens.

    Attributes:
      decoder: self-attention of B * K rows.
      log_weights: [B, K] float32: token: log p(z|x); sequence: log p(z|x, y_<i).
      log_probs: [B, K, V] float32, log p(y_i|x, z, y_<i) of the last step, from which the next token's weights follow;
        None for RAG-Token, whose weights never change.
    """

    decoder: DecoderCache
    log_weights: Array
    log_probs: Array | None


@struct.dataclass
class Question:
    """The arm without passages, for ``answering``: the null document alone (see ``ExpertRAG``'s ``Question``)."""

    memory: Documents
    first_log_probs: Array
    cache: Cache


@registry.register("RAG")
@checked
@dataclasses.dataclass(frozen=True)
class RAG:
    """The system; every field is a gin value.

    Attributes:
      model: the generator. retriever: its query encoder, trained through the marginal; passage vectors are frozen.
      marginal: ``sequence`` or ``token``.
      temperature: of the scores; that of the retriever's training, as its vectors have length 1.
      null_document: whether retrieving nothing is one of the latent variable's values.
      max_target_length: tokens of an answer, EOS included.
      label_smoothing: of the generator; the prior is never smoothed.
      z_loss, balance_loss_factor, router_z_loss_factor: T5X's meanings.
      refresh_period: every so many steps candidates come from the query encoder as it is now (see ``candidates``);
        0: they stay those of the data.
      candidates: ``(params, batch) -> batch`` on the host before each step; see ``candidates.Candidates``, whose
        ``before_checkpoint`` goes with it.
      steps, optimizer: of the one phase ``rag``.
      decoding: ``greedy`` and ``beam`` follow p(y_i|x, y_<i); ``thorough`` and ``fast`` are RAG-Sequence's. beams: W.
    """

    weighs_passages: ClassVar[bool] = True  # reading takes queries and passage vectors

    model: TransformerConfig
    retriever: DualEncoderConfig
    marginal: str = "sequence"
    temperature: Positive = 0.05
    null_document: bool = False
    max_target_length: Length = 16
    label_smoothing: Rate = 0.0
    z_loss: Weight = 1e-4
    balance_loss_factor: Weight = 0.01
    router_z_loss_factor: Weight = 0.0
    refresh_period: Natural = 0
    candidates: Callable[[Any, Batch], Batch] | None = None
    steps: Natural = 1000
    optimizer: Callable[[], optax.GradientTransformation] = lambda: optax.adafactor(1e-3)
    decoding: str = "greedy"
    beams: Count = 4

    def __post_init__(self):
        for name, known in (("marginal", MARGINALS), ("decoding", DECODINGS)):
            if getattr(self, name) not in known:
                raise UserError(f"RAG.{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}.")
        if self.marginal == "token" and self.decoding in ("thorough", "fast"):
            raise UserError(f"RAG.decoding '{self.decoding}' is RAG-Sequence's; RAG-Token has 'greedy' and 'beam'.")

    @property
    def phases(self) -> tuple[Phase, ...]:
        """One phase called ``rag``: generator and query encoder together."""
        trainable, optimizer = TRAINABLE, self.optimizer
        if self.null_document:
            trainable += ("null_document/.*",)
        if self.refresh_period:
            trainable += (f"{SNAPSHOT}/.*",)

            def optimizer():
                return with_snapshot(self.optimizer(), "query_encoder", self.refresh_period)

        renew = getattr(self.candidates, "before_checkpoint", None)
        return (Phase("rag", self.steps, self.loss, optimizer, trainable, self.candidates, renew),)

    # Parameters

    def init(self, rng: Array) -> dict:
        """Generator at the root; ``query_encoder``, ``null_document``, ``candidate_encoder`` beside it; float32."""
        return generator.plain(self._boxed(rng))

    def logical_axes(self) -> dict:
        """The tree of ``init`` with logical axis names."""
        return generator.axes_of(jax.eval_shape(self._boxed, jax.random.PRNGKey(0)))

    def _boxed(self, rng):
        keys = jax.random.split(rng, 2)
        params = dict(generator.initial_parameters(self.model, keys[0]))
        tower = Tower(self.retriever).init(keys[1], jnp.ones((1, 8), jnp.int32))["params"]
        params["query_encoder"] = tower
        if self.null_document:
            params["null_document"] = {"vector": jnp.zeros((self.retriever.output_dim,))}
        if self.refresh_period:
            params[SNAPSHOT] = {"encoder": tower, "refreshes": jnp.zeros((1,))}
        return params

    # The prior and the documents

    def query_vectors(self, params, query_tokens: Array, rng: Array | None = None) -> Array:
        """Questions in the retriever's vocabulary [B, Lq] int32 -> q(x) [B, D] float32."""
        rngs = None if rng is None else {"dropout": rng}
        tower = Tower(self.retriever)
        return tower.apply({"params": params["query_encoder"]}, query_tokens, rng is None, rngs=rngs)

    def read(self, params, question_tokens, query_tokens, passage_tokens, passage_vectors) -> Documents:
        """Questions [B, L], their queries [B, Lq], reader inputs [B, K, P] and passage vectors [B, K, D] -> Documents.

        A reader input includes the question; a row of zeros is an absent passage. The null document is added here.
        """
        inputs = (question_tokens, query_tokens, passage_tokens, passage_vectors)
        return self._documents(params, *inputs)[0]

    def _documents(
        self, params, question_tokens, query_tokens, passage_tokens, passage_vectors, query_rng=None, rng=None
    ):
        """(Documents, reader inputs with the null document's, router collection)"""
        queries = self.query_vectors(params, query_tokens, query_rng)
        scores = jnp.einsum("bd,bkd->bk", queries, jax.lax.stop_gradient(passage_vectors))
        if self.null_document:
            passage_tokens = with_question_alone(passage_tokens, question_tokens)
            null_score = queries @ params["null_document"]["vector"]
            scores = jnp.concatenate([scores, null_score[:, None]], axis=1)
        documents, router = self._encode(params, passage_tokens, scores, rng)
        return documents, passage_tokens, router

    def _encode(self, params, passage_tokens, scores, rng=None):
        """All passages of all questions in one batch of the encoder."""
        folded = fusion.fold_passages(passage_tokens)
        states, router = generator.apply(self.model, params, folded, None, rng is None, method="encode", rng=rng)
        memory, _ = generator.apply(self.model, params, states, folded > 0, method="memory")
        present = (passage_tokens > 0).any(-1)
        return Documents(memory, marginals.log_prior(scores, present, self.temperature)), router

    # The loss

    def loss(self, params, batch: Batch, rng: Array | None):
        """-log p(y|x) per target token, a mean over questions, plus the router's losses.

        A question without target or without any passage counts for nothing. ``batch.passage_vectors`` [B, K, D] are
        constants: only q(x) moves the prior.

        Raises:
          UserError: the batch has no passage vectors.
        """
        keys = (None, None, None) if rng is None else jax.random.split(rng, 3)
        if batch.passage_vectors is None:
            raise UserError(
                "RAG's prior needs passage_vectors in the batch: bind RAG.candidates to candidates.Candidates over an "
                "index with vectors."
            )
        inputs = (batch.encoder_input_tokens, batch.query_tokens, batch.passage_tokens, batch.passage_vectors)
        documents, passage_tokens, encoder_router = self._documents(params, *inputs, *keys[:2])
        scored = self._token_scores(params, documents, batch, passage_tokens, keys[2])
        token_log_probs, log_z, valid, decoder_router = scored
        sum_out = marginals.sequence_marginal if self.marginal == "sequence" else marginals.token_marginal
        weights = batch.decoder_loss_weights
        log_marginal = sum_out(documents.log_prior, token_log_probs, weights)
        tokens = weights.sum(-1)
        counts = ((tokens > 0) & (passage_tokens > 0).any((1, 2))).astype(jnp.float32)
        total = jnp.where(counts > 0, -log_marginal / jnp.maximum(tokens, 1.0), 0.0).sum()
        extra, metrics = generator.router_losses(
            (encoder_router, decoder_router), self.balance_loss_factor, self.router_z_loss_factor
        )
        extra += self.z_loss * (jnp.square(log_z) * valid).sum() / jnp.maximum(valid.sum(), 1.0)
        metrics |= {"loss": (total, counts.sum()), "target_tokens": (tokens.sum(), jnp.ones(()))}
        metrics |= self._retrieval_metrics(documents.log_prior, token_log_probs, batch, counts)
        return total / jnp.maximum(counts.sum(), 1.0) + extra, metrics

    def evaluation_loss(self, params, batch: Batch):
        """The same without dropout, jitter, dropped tokens or label smoothing."""
        return dataclasses.replace(self, label_smoothing=0.0).loss(params, batch, None)

    def _token_scores(self, params, documents, batch, passage_tokens, rng):
        """(log p(y_i|x, z, y_<i), logsumexp of its logits, where both mean something; each [B, K, T], router)."""
        count = passage_tokens.shape[1]
        present = (passage_tokens > 0).any(-1)
        real = (batch.decoder_target_tokens > 0)[:, None] & present[..., None]  # [B, K, T]
        rows = real.reshape(-1, real.shape[-1])
        inputs, targets = (
            jnp.repeat(x, count, axis=0) for x in (batch.decoder_input_tokens, batch.decoder_target_tokens)
        )
        states, router = generator.apply(
            self.model, params, inputs, rows.astype(jnp.int32), documents.memory, rng is None, method="decode", rng=rng
        )

        def output(states):
            return generator.apply(self.model, params, states, method="output")[0]

        of_target, of_all, log_z = (
            score.reshape(real.shape) for score in marginals.token_scores(states, targets, output)
        )
        log_probs = marginals.smoothed(of_target, of_all, self.model.vocab_size, self.label_smoothing)
        return log_probs, log_z, real * (batch.decoder_loss_weights > 0)[:, None], router

    def _retrieval_metrics(self, log_prior, token_log_probs, batch, counts):
        """How sure the prior is, how sure it should be, and how many different passages the batch reads."""
        likelihood = marginals.answer_log_probs(token_log_probs, batch.decoder_loss_weights)
        posterior = marginals.log_posterior(log_prior, likelihood)
        units = counts.sum()

        def mean(values):
            return jax.lax.stop_gradient((jnp.where(counts > 0, values, 0.0).sum(), units))

        metrics = {
            "retrieval/prior_entropy": mean(marginals.entropy(log_prior)),
            "retrieval/posterior_entropy": mean(marginals.entropy(posterior)),
        }
        if self.null_document:
            metrics["retrieval/null_probability"] = mean(jnp.exp(log_prior[:, -1]))
        if batch.passage_rows is not None:
            rows = jnp.sort(batch.passage_rows.reshape(-1))
            first = jnp.concatenate([jnp.ones((1,), bool), rows[1:] != rows[:-1]]) & (rows >= 0)
            found = (rows >= 0).sum().astype(jnp.float32)
            metrics["retrieval/distinct"] = (first.sum().astype(jnp.float32), jnp.maximum(found, 1.0))
        return metrics

    # Answering: p(y_i|x, y_<i) step by step

    def generate(self, params, memory: Documents, first_log_probs: Array, cache: Cache, length: int, active: Array):
        """Answers by ``decoding``: tokens [B, T] int32, log p(y|x) [B] float32; see ``rag_decoding.generate``."""
        return rag_decoding.generate(self, params, memory, first_log_probs, cache, length, active)

    def encode_question(self, params, question_tokens: Array) -> Question:
        """Questions [B, L] int32 -> the arm without passages: the null document alone, certain."""
        passage = question_tokens[:, None]
        documents, _ = self._encode(params, passage, jnp.zeros(passage.shape[:2]))
        return Question(documents, *self.begin(params, documents))

    def decide(self, params, question: Question) -> Array:
        """p_ret [B] float32: it always retrieves; the null document is weighed among the passages."""
        return jnp.ones(question.first_log_probs.shape[0])

    def begin(self, params, memory: Documents) -> tuple[Array, Cache]:
        """First decoding step over B questions: (log p(y_1|x) [B, V] float32, cache)."""
        batch, count = memory.log_prior.shape
        cache = empty_cache(self.model, batch * count, self.max_target_length)
        return self._step(params, memory, Cache(cache, memory.log_prior, None), jnp.zeros((batch,), jnp.int32))

    def decode_step(self, params, memory: Documents, cache: Cache, tokens: Array) -> tuple[Array, Cache]:
        """tokens y_(i-1) [B] int32 -> (log p(y_i|x, y_<i) [B, V] float32, cache).

        Token: log sum_z p(z|x) p(y_i|x, z, y_<i), the transition of the paper's section 2.5. Sequence: the chain rule
        log sum_z p(z|x, y_<i) p(y_i|x, z, y_<i), whose product over i is RAG-Sequence's marginal, exactly.
        """
        if self.marginal == "sequence":
            said = jnp.take_along_axis(cache.log_probs, tokens[:, None, None], axis=2)[..., 0]
            cache = cache.replace(log_weights=marginals.log_posterior(cache.log_weights, said))
        return self._step(params, memory, cache, tokens)

    def _step(self, params, memory, cache, tokens):
        count = memory.log_prior.shape[1]
        active = (memory.log_prior > marginals.ABSENT / 2).reshape(-1)
        log_probs, decoder = generator.decode_step(
            self.model, params, memory.memory, cache.decoder, jnp.repeat(tokens, count), active
        )
        log_probs = log_probs.reshape(-1, count, log_probs.shape[-1])
        mixed = jax.nn.logsumexp(cache.log_weights[..., None] + log_probs, axis=1)
        return mixed, Cache(decoder, cache.log_weights, log_probs if self.marginal == "sequence" else None)


def with_question_alone(passage_tokens: Array, question_tokens: Array) -> Array:
    """Reader inputs [B, K, P] and questions [B, L] -> [B, K + 1, P], the question alone last.

    Raises:
      UserError: L is larger than P, and a question would be cut.
    """
    room = passage_tokens.shape[-1] - question_tokens.shape[-1]
    if room < 0:
        raise UserError(
            f"a reader input holds {passage_tokens.shape[-1]} tokens and a question {question_tokens.shape[-1]}, but "
            "the null document is a question in a passage's place: raise 'passages' in TASK_FEATURE_LENGTHS."
        )
    alone = jnp.pad(question_tokens, ((0, 0), (0, room)))
    return jnp.concatenate([passage_tokens, alone[:, None]], axis=1)
