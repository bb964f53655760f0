"""DRO, Direct Retrieval-augmented Optimization (arXiv 2505.03075): a selector and a generator, trained by EM.

A retriever gives n candidate passages for a question x. A *selector* p(z|x) reads them all and emits an ordered choice
z of K distinct ones, the paper's document permutation; a *generator* p(y|x, z) reads the chosen passages in that order
and answers. The choice is a latent variable, and training alternates:

* estimation: m choices per question are drawn from the selector and weighed, w_i proportional to
  p(y|x, z_i) p(z_i|x) / proposal(z_i), sum 1;
* maximization: the selector maximises sum_i w_i log p(z_i|x), the generator sum_i w_i log p(y|x, z_i).

Both are T5s, the generator at the root of the parameters and the selector under ``selector/``. Both encode every
candidate on its own together with the question (fusion-in-decoder, arXiv 2007.01282): a small reader of concatenated
passages does not learn which one to read, and a passage is encoded once whatever number of choices holds it. Encoders
do not know the order; an embedding is added to a passage's states behind the encoder: for the selector its number, for
the generator its place in the choice, as a prompt would number the passages. Numbers are the last n rows of the
selector's embedding and places the last K of the generator's.

What the selector's decoder emits and reads back is a candidate's *identifier*: its number's embedding plus the sum of
its states over the square root of how many they are, one vector in both places, as embeddings are tied. A bare number
says where a candidate stands and not what it says; then the next one, which a passage chosen before points to, has to
be found by attention alone, which a small selector does not learn (docs/results/dro.md).

Before EM comes a warm-up: the generator learns on the K passages retrieved first, then the selector to choose the K
candidates under which, each read alone, the generator finds the answer likeliest.

Shapes: B questions, n candidates, m samples, K chosen, P reader input, T answer, V vocabulary.
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
from expertrag_jax.model import fusion
from expertrag_jax.model.config import TransformerConfig
from expertrag_jax.model.dual_encoder import DualEncoderConfig, Tower
from expertrag_jax.model.transformer import DecoderCache, Memory
from expertrag_jax.ranges import Count, Length, Natural, Positive, Rate, Share, Weight, checked
from expertrag_jax.systems import generator, permutations
from expertrag_jax.systems.expert_rag import ExpertRAG, Question
from expertrag_jax.systems.system import Phase

Array = jax.Array
GENERATOR, SELECTOR, PREVIOUS = "(token_embedder|encoder|decoder)/.*", "selector/.*", "previous/.*"


def copying() -> optax.GradientTransformation:
    """Plain descent with rate 1 on a distance copies; its second step removes the rounding error of the first."""
    return optax.sgd(1.0)


@struct.dataclass
class Estimate:
    """The E-step of B questions.

    Attributes:
      choices: [B, m, K] int32. weights: [B, m] float32, sum 1.
      log_likelihood, log_prior, log_proposal: [B, m] float32, of the choices; see ``permutations``.
    """

    choices: Array
    weights: Array
    log_likelihood: Array
    log_prior: Array
    log_proposal: Array


@struct.dataclass
class Reading(Memory):
    """What answering reads.

    Attributes:
      choices: [B, K] int32, which of the candidates it holds.
    """

    choices: Array


@struct.dataclass
class Candidates:
    """B questions' candidates, encoded by one of the two models.

    Attributes:
      states: [B, n, P, D]. mask: [B, n, P] bool. present: [B, n] bool.
      router: the encoder's router collection.
    """

    states: Array
    mask: Array
    present: Array
    router: dict


def summary(candidates: Candidates) -> Array:
    """[B, n, D], the sum of a candidate's states over the square root of how many they are."""
    summed = jnp.where(candidates.mask[..., None], candidates.states, 0).sum(2)
    return summed / jnp.sqrt(jnp.maximum(candidates.mask.sum(-1), 1))[..., None].astype(summed.dtype)


@registry.register("DRO")
@checked
@dataclasses.dataclass(frozen=True)
class DRO:
    """The system; every field is a gin value. Defaults are the paper's.

    Attributes:
      model: the generator's sizes. selector: the selector's; None: the generator's.
      retriever: the query encoder's, which is carried for answering over a dense index and never trained; None: the
        index is lexical.
      num_candidates: n. num_selected: K. num_samples: m. iterations: N.
      online: both steps of EM in each training step. Otherwise the E-step's choices and weights are those of the
        parameters at the iteration's start, which are kept under ``previous/``. Either way an iteration has its own
        optimizer state, and is measured and saved at its end.
      temperature, top_p: of the proposal, see ``permutations.sample``.
      max_target_length, label_smoothing, z_loss, balance_loss_factor, router_z_loss_factor: as in ``ExpertRAG``;
        smoothing and z-loss are the M-step's, never the weights'.
      warm_generator_steps, warm_selector_steps, iteration_steps: optimizer steps of the warm-ups and of each
        maximization; an epoch of the questions each in the paper.
      warm_optimizer, optimizer: of the warm-ups, and of maximization.
    """

    model: TransformerConfig
    selector: TransformerConfig | None = None
    retriever: DualEncoderConfig | None = None
    num_candidates: Count = 20
    num_selected: Count = 5
    num_samples: Count = 8
    iterations: Natural = 5
    online: bool = False
    temperature: Positive = 1.0
    top_p: Share = 1.0
    max_target_length: Length = 16
    label_smoothing: Rate = 0.0
    z_loss: Weight = 0.0
    balance_loss_factor: Weight = 0.01
    router_z_loss_factor: Weight = 0.0
    warm_generator_steps: Natural = 1000
    warm_selector_steps: Natural = 1000
    iteration_steps: Natural = 1000
    warm_optimizer: Callable[[], optax.GradientTransformation] = lambda: optax.adamw(1e-5)
    optimizer: Callable[[], optax.GradientTransformation] = lambda: optax.adamw(1e-5)

    def __post_init__(self):
        if not 1 <= self.num_selected <= self.num_candidates:
            raise UserError(
                f"num_selected is {self.num_selected}: it must lie between 1 and num_candidates={self.num_candidates}."
            )

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Two warm-ups, then N times estimation and maximization, or N times both ``online``."""
        warm_up = (
            Phase(
                "warm_generator", self.warm_generator_steps, self.warm_generator_loss, self.warm_optimizer, (GENERATOR,)
            ),
            Phase(
                "warm_selector", self.warm_selector_steps, self.warm_selector_loss, self.warm_optimizer, (SELECTOR,)
            ),
        )
        both = (GENERATOR, SELECTOR)
        phases = list(warm_up)
        for i in range(1, self.iterations + 1):
            if self.online:
                phases.append(Phase(f"online_{i}", self.iteration_steps, self.online_loss, self.optimizer, both))
                continue
            phases.append(Phase(f"estimation_{i}", 2, self.distance_to_previous, copying, (PREVIOUS,)))
            phases.append(Phase(f"maximization_{i}", self.iteration_steps, self.loss, self.optimizer, both))
        return tuple(phases)

    # Parameters

    def init(self, rng: Array) -> dict:
        """Generator at the root, ``selector``, unless ``online`` a copy of both as ``previous``, and with a
        ``retriever`` its ``query_encoder``; float32."""
        params = generator.plain(self._boxed(rng))
        previous = {} if self.online else {"previous": jax.tree.map(jnp.array, params)}
        return params | previous | generator.plain(self._query_encoder(rng))

    def logical_axes(self) -> dict:
        """The tree of ``init`` with logical axis names."""
        shapes = (jax.eval_shape(make, jax.random.PRNGKey(0)) for make in (self._boxed, self._query_encoder))
        trained, carried = map(generator.axes_of, shapes)
        return trained | ({} if self.online else {"previous": trained}) | carried

    def _boxed(self, rng):
        keys = jax.random.split(rng)
        params = dict(generator.initial_parameters(self.model, keys[0]))
        return params | {"selector": generator.initial_parameters(self._selector, keys[1])}

    def _query_encoder(self, rng):
        if self.retriever is None:
            return {}
        tower = Tower(self.retriever).init(jax.random.fold_in(rng, 1), jnp.ones((1, 8), jnp.int32))
        return {"query_encoder": tower["params"]}

    @property
    def _selector(self) -> TransformerConfig:
        return self.selector or self.model

    # The selector, p(z|x)

    def scorer(self, params, passage_tokens: Array, rng: Array | None = None) -> tuple[Callable, Array]:
        """The selector over candidates [B, n, P] int32, question included.

        Returns:
          (score, present [B, 1, n]): ``score(choices [B, m, K]) -> (logits [B, m, K, n], router collections)``.
        Raises:
          UserError: fewer than K candidates, or more than it has identifiers for.
        """
        count = passage_tokens.shape[1]
        if not self.num_selected <= count <= self.num_candidates:
            raise UserError(
                f"a question has {count} passages and DRO chooses {self.num_selected} out of at most "
                f"{self.num_candidates}: set NUM_PASSAGES to a number between them."
            )
        config, params = self._selector, params["selector"]
        embedding = params["token_embedder"]["embedding"]
        encode_rng, decode_rng = (None, None) if rng is None else jax.random.split(rng)
        candidates = self._encode(config, params, passage_tokens, encode_rng)
        first = config.vocab_size - self.num_candidates  # the first candidate's number
        numbers = embedding[first : first + count].astype(candidates.states.dtype)
        identifiers = numbers + summary(candidates)  # [B, n, D]
        states = (candidates.states + numbers[:, None]).reshape(len(passage_tokens), -1, config.embed_dim)
        mask = candidates.mask.reshape(len(passage_tokens), -1)
        memory, _ = generator.apply(config, params, states, mask, method="memory")

        def score(choices):
            rows, samples, places = choices.shape
            # All samples of a question in one decoder row, kept apart by segments: the memory is not repeated, and a
            # relative position does not tell where in the row it is.
            said = jax.vmap(lambda each, chosen: each[chosen])(identifiers, choices[..., :-1])
            start = jnp.broadcast_to(embedding[0].astype(said.dtype), (rows, samples, 1, said.shape[-1]))
            inputs = jnp.concatenate([start, said], axis=2).reshape(rows, samples * places, -1)
            segments = jnp.broadcast_to(jnp.repeat(jnp.arange(1, samples + 1), places), inputs.shape[:2])
            states, router = generator.apply(
                config, params, inputs, segments, memory, decode_rng is None, method="decode_embedded", rng=decode_rng
            )
            logits = jnp.einsum("btd,bnd->btn", states, identifiers, preferred_element_type=jnp.float32)
            logits = logits.reshape(rows, samples, places, count) / config.embed_dim**0.5
            return logits, (candidates.router, router)

        return score, candidates.present[:, None]

    def log_prior(self, params, passage_tokens: Array, choices: Array, rng: Array | None = None):
        """log p(z|x) of choices [B, m, K] among candidates [B, n, P] -> ([B, m], router collections)."""
        score, present = self.scorer(params, passage_tokens, rng)
        logits, router = score(choices)
        return permutations.log_probability(logits, choices, present), router

    def select(self, params, passage_tokens: Array, number: int | None = None) -> Array:
        """The likeliest candidate at each of K (or ``number``) places: [B, n, P] -> choices [B, 1, K] int32."""
        score, present = self.scorer(params, passage_tokens)
        shape = (len(passage_tokens), 1, number or self.num_selected)
        return permutations.greedy(lambda z: score(z)[0], shape, present)

    # The generator, p(y|x, z)

    def read_choices(self, params, passage_tokens: Array, choices: Array, rng: Array | None = None):
        """Candidates [B, n, P] and choices [B, m, K] of them -> (Memory of B * m rows, router collection)."""
        pick = jax.vmap(lambda passages, chosen: passages[chosen])
        samples, places = choices.shape[1:]
        alone = samples * places <= passage_tokens.shape[1]  # then nothing but what was chosen is encoded
        read = pick(passage_tokens, choices.reshape(len(choices), -1)) if alone else passage_tokens
        encoded = self._encode(self.model, params, read, rng)
        # [B, m, K, P, D] and [B, m, K, P]
        states, mask = (
            x.reshape(*choices.shape, *x.shape[2:]) if alone else pick(x, choices)
            for x in (encoded.states, encoded.mask)
        )
        first = self.model.vocab_size - self.num_selected
        numbers = params["token_embedder"]["embedding"][first : first + places]
        states = (states + numbers[:, None].astype(states.dtype)).reshape(len(choices) * samples, -1, states.shape[-1])
        mask = mask.reshape(len(states), -1)
        return generator.apply(self.model, params, states, mask, method="memory")[0], encoded.router

    def answer_losses(self, params, batch: Batch, choices: Array, rng: Array | None = None):
        """Token losses of each question's answer under each of its choices [B, m, K].

        Returns:
          (losses [B * m, T] float32, logits [B * m, T, V], the answers' Batch of B * m rows, router collections);
          smoothing and z-loss only with ``rng``, which means training.
        """
        read_rng, decode_rng = (None, None) if rng is None else jax.random.split(rng)
        memory, router = self.read_choices(params, batch.passage_tokens, choices, read_rng)
        answers = Batch(
            **{
                name: jnp.repeat(getattr(batch, name), choices.shape[1], axis=0)
                for name in ("decoder_input_tokens", "decoder_target_tokens", "decoder_loss_weights")
            }
        )
        extra = {} if rng is None else {"label_smoothing": self.label_smoothing, "z_loss": self.z_loss}
        losses, logits, decoder_router = generator.target_loss(
            self.model, params, answers, memory, rng=decode_rng, **extra
        )
        return losses, logits, answers, (router, decoder_router)

    def log_likelihood(self, params, batch: Batch, choices: Array, rng: Array | None = None):
        """log p(y|x, z) of the whole answer, a sum over its tokens -> ([B, m] float32, router collections)."""
        losses, _, answers, router = self.answer_losses(params, batch, choices, rng)
        return -(losses * answers.decoder_loss_weights).sum(-1).reshape(choices.shape[:2]), router

    def _encode(self, config, params, passage_tokens, rng) -> Candidates:
        rows, count, length = passage_tokens.shape
        states, router = generator.apply(
            config, params, fusion.fold_passages(passage_tokens), None, rng is None, method="encode", rng=rng
        )
        mask = passage_tokens > 0
        return Candidates(states.reshape(rows, count, length, -1), mask, mask.any(-1), router)

    # E-step

    def estimate(self, params, batch: Batch, rng: Array) -> Estimate:
        """Draws m choices per question, and weighs them."""
        score, present = self.scorer(params, batch.passage_tokens)
        shape = (len(batch.passage_tokens), self.num_samples, self.num_selected)
        choices, log_proposal = permutations.sample(
            lambda z: score(z)[0], shape, rng, self.temperature, self.top_p, present
        )
        log_prior = permutations.log_probability(score(choices)[0], choices, present)
        log_likelihood, _ = self.log_likelihood(params, batch, choices)
        weights = permutations.importance_weights(log_likelihood, log_prior, log_proposal)
        return Estimate(choices, weights, log_likelihood, log_prior, log_proposal)

    # M-step

    def maximization_loss(self, params, batch: Batch, estimate: Estimate, rng: Array | None):
        """-sum_i w_i (log p(z_i|x) + log p(y|x, z_i)), weights constant; a mean over questions, in nats."""
        selector_rng, generator_rng = (None, None) if rng is None else jax.random.split(rng)
        log_prior, selector_router = self.log_prior(params, batch.passage_tokens, estimate.choices, selector_rng)
        log_likelihood, generator_router = self.log_likelihood(params, batch, estimate.choices, generator_rng)
        extra, metrics = generator.router_losses(
            (generator_router, selector_router), self.balance_loss_factor, self.router_z_loss_factor
        )
        asked = (batch.decoder_loss_weights > 0).any(-1).astype(jnp.float32)  # the other rows are padding
        count = asked.sum()

        def total(per_question):
            return (per_question * asked).sum(), count

        selector_loss = -permutations.expected(estimate.weights, log_prior)
        generator_loss = -permutations.expected(estimate.weights, log_likelihood)
        evidence = permutations.log_evidence(estimate.log_likelihood, estimate.log_prior, estimate.log_proposal)
        loss = total(selector_loss + generator_loss)
        return loss[0] / jnp.maximum(count, 1.0) + extra, metrics | {
            "loss": loss,
            "selector_loss": total(selector_loss),
            "generator_loss": total(generator_loss),
            "effective_sample_size": total(permutations.effective_sample_size(estimate.weights)),
            "log_evidence": total(evidence),
        }

    def loss(self, params, batch: Batch, rng: Array):
        """An M-step on the E-step of the parameters at the iteration's start."""
        return self._em_loss(params, params["previous"], batch, rng)

    def online_loss(self, params, batch: Batch, rng: Array):
        """An M-step on the E-step of the parameters as they are."""
        return self._em_loss(params, params, batch, rng)

    def _em_loss(self, params, previous, batch, rng):
        estimate_rng, rng = jax.random.split(rng)
        estimate = jax.lax.stop_gradient(self.estimate(previous, batch, estimate_rng))
        return self.maximization_loss(params, batch, estimate, rng)

    def distance_to_previous(self, params, batch: Batch, rng: Array):
        """Half the squared distance of ``previous`` to the parameters; its gradient is the difference."""
        del rng
        now = jax.lax.stop_gradient({name: params[name] for name in params["previous"]})
        squares = jax.tree.map(lambda old, new: jnp.square(old - new).sum(), params["previous"], now)
        loss = 0.5 * sum(jax.tree.leaves(squares))
        count = jnp.asarray(float(batch.size))
        return loss, {"loss": (loss * count, count)}

    # Warm-up

    def warm_generator_loss(self, params, batch: Batch, rng: Array):
        """Cross-entropy per target token with the K passages that were retrieved first."""
        first = jnp.broadcast_to(jnp.arange(self.num_selected), (batch.size, 1, self.num_selected))
        return self._token_loss(params, batch, first, rng)

    def warm_selector_loss(self, params, batch: Batch, rng: Array):
        """-log p(z|x) of the ranking: the K candidates under which, each alone, the answer is likeliest, best first."""
        rows, count, _ = batch.passage_tokens.shape
        alone = jnp.broadcast_to(jnp.arange(count)[:, None], (rows, count, 1))
        present = (batch.passage_tokens > 0).any(-1)
        utility = jnp.where(present, self.log_likelihood(params, batch, alone)[0], -jnp.inf)
        ranking = jax.lax.top_k(jax.lax.stop_gradient(utility), self.num_selected)[1][:, None]
        log_prior, router = self.log_prior(params, batch.passage_tokens, ranking, rng)
        extra, metrics = generator.router_losses(router, self.balance_loss_factor, self.router_z_loss_factor)
        asked = (batch.decoder_loss_weights > 0).any(-1).astype(jnp.float32)
        loss = -(log_prior[:, 0] * asked).sum()
        return loss / jnp.maximum(asked.sum(), 1.0) + extra, metrics | {"loss": (loss, asked.sum())}

    # Answering

    def evaluation_loss(self, params, batch: Batch):
        """Cross-entropy per target token with the passages that the selector chooses, without dropout."""
        return self._token_loss(params, batch, self.select(params, batch.passage_tokens), None)

    def _token_loss(self, params, batch, choices, rng):
        losses, logits, answers, router = self.answer_losses(params, batch, choices, rng)
        extra, metrics = generator.router_losses(router, self.balance_loss_factor, self.router_z_loss_factor)
        return generator.loss_and_metrics(losses, logits, answers, extra, metrics)

    def encode_question(self, params, question_tokens: Array) -> Question:
        """Question tokens [B, L] int32 -> Question: the generator without passages."""
        arm = ExpertRAG(model=self.model, max_target_length=self.max_target_length)
        return arm.encode_question(params, question_tokens)

    def query_vectors(self, params, query_tokens: Array) -> Array:
        """Questions in the retriever's vocabulary [B, Lq] int32 -> [B, D] float32."""
        return Tower(self.retriever).apply({"params": params["query_encoder"]}, query_tokens)

    def decide(self, params, question: Question) -> Array:
        """p_ret [B] float32: it always retrieves."""
        return jnp.ones(question.features.shape[0])

    def read(self, params, passage_tokens: Array, question_tokens: Array | None = None) -> Reading:
        """Candidates [B, n, P] int32, question included -> the K that the selector chooses, in its order."""
        choices = self.select(params, passage_tokens)
        memory, _ = self.read_choices(params, passage_tokens, choices)
        return Reading(memory.layers, memory.mask, choices[:, 0])

    def begin(self, params, memory: Memory) -> tuple[Array, DecoderCache]:
        """First decoder step over a memory: ([B, V] log-probabilities, cache)."""
        return generator.begin(self.model, params, memory, self.max_target_length, memory.mask.any(-1))

    def decode_step(self, params, memory: Memory, cache: DecoderCache, tokens: Array):
        """tokens [B] int32 -> ([B, V] log-probabilities, cache)."""
        return generator.decode_step(self.model, params, memory, cache, tokens)
