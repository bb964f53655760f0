"""Decoding with the passage summed out (RAG, arXiv 2005.11401, section 2.5).

* ``greedy`` and ``beam`` are one search over p(y_i|x, y_<i): RAG-Token's transition sum_z p(z|x) p(y_i|x, z, y_<i), or
  RAG-Sequence's by the chain rule (see ``RAG.decode_step``).
* ``thorough``: a beam per passage; every hypothesis of their union is scored under every passage, so its score is
  RAG-Sequence's marginal.
* ``fast``: the same beams; a hypothesis has probability 0 under a passage whose beam does not hold it.

All of them rank what ends before what the limit on tokens cut off.

Every passage's cross-attention keys and values are computed once, in ``RAG.read``; beams share them. Shapes: B
questions, K passages, W beams, N = K * W hypotheses, T tokens, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from expertrag_jax import decoding
from expertrag_jax.model.transformer import DecoderCache, Memory, empty_cache, take_rows
from expertrag_jax.systems import generator, marginals

Array = jax.Array


def generate(system, params, documents, first_log_probs: Array, cache, length: int, active: Array):
    """Answers by ``system.decoding``.

    Args:
      system: a ``RAG``. documents: of ``system.read``. first_log_probs [B, V], cache: of ``system.begin``.
      length: T. active: [B] bool; other rows are padding.
    Returns:
      (tokens [B, T] int32, log p(y|x) [B] float32; a lower bound of it with ``fast``)
    """
    if system.decoding == "greedy":

        def step(tokens, cache):
            return system.decode_step(params, documents, cache, tokens)

        return decoding.greedy(step, cache, first_log_probs, length, active)
    if system.decoding == "beam":
        tokens, scores = beam(system, params, documents, first_log_probs, cache, length, system.beams)
    else:
        search = thorough if system.decoding == "thorough" else fast
        tokens, scores = search(system, params, documents, length, system.beams)
    live = active[:, None]
    return jnp.where(live, tokens[:, 0], decoding.PAD), jnp.where(active, scores[:, 0], 0.0)


def beam(system, params, documents, first_log_probs, cache, length: int, beams: int, alpha: float = 0.0):
    """One beam over the marginal transition.

    Args:
      alpha: length penalty, see ``decoding.beam``; the others as in ``generate``.
    Returns:
      (tokens [B, W, T], scores [B, W]), best first
    """
    batch = first_log_probs.shape[0]
    spread = jnp.repeat(jnp.arange(batch), beams)
    wide = take_questions(system, documents, spread)

    def step(tokens, cache):
        return system.decode_step(params, wide, cache, tokens)

    def reorder(cache, rows):
        return take_cache(system, cache, rows)

    return decoding.beam(step, reorder(cache, spread), first_log_probs, length, beams, reorder, alpha)


def thorough(system, params, documents, length: int, beams: int):
    """Every hypothesis of any passage's beam, by RAG-Sequence's marginal.

    Returns:
      (tokens [B, N, T], log p(y|x) [B, N]), best first; a hypothesis that several beams hold stands there once, the
      others score ``decoding.NEGATIVE``.
    """
    hypotheses, scores = passage_beams(system, params, documents, length, beams)
    real = decoding.is_real(scores)
    first = ~jnp.tril(same(hypotheses) & real[:, None], -1).any(-1) & real  # an absent passage's copy does not count
    log_likelihood = score_hypotheses(system, params, documents, hypotheses)
    found = jax.nn.logsumexp(documents.log_prior[:, None] + log_likelihood, axis=-1)
    return ordered(hypotheses, jnp.where(first, found, decoding.NEGATIVE))


def fast(system, params, documents, length: int, beams: int):
    """The same hypotheses; under a passage whose beam lacks one, it has probability 0. Result as ``thorough``."""
    hypotheses, scores = passage_beams(system, params, documents, length, beams)
    real = decoding.is_real(scores)
    equal = same(hypotheses) & real[:, None]  # [B, N, N]: hypothesis i is what passage z(j)'s beam holds at j
    first = ~jnp.tril(equal, -1).any(-1) & real
    weighed = jnp.repeat(documents.log_prior, beams, axis=1) + scores  # log p(z(j)|x) p(y_j|x, z(j))
    found = jax.nn.logsumexp(jnp.where(equal, weighed[:, None], marginals.ABSENT), axis=-1)
    return ordered(hypotheses, jnp.where(first, found, decoding.NEGATIVE))


def passage_beams(system, params, documents, length: int, beams: int) -> tuple[Array, Array]:
    """A beam search under every passage alone.

    Returns:
      (tokens [B, N, T], log p(y|x, z) [B, N] under the passage whose beam it is: N = z * W + w); a passage that is
      absent has no hypotheses, and theirs score ``decoding.NEGATIVE``.
    """
    batch, count = documents.log_prior.shape
    rows = batch * count
    present = (documents.log_prior > marginals.ABSENT / 2).reshape(-1)
    memory = documents.memory
    first, cache = generator.decode_step(
        system.model, params, memory, empty_cache(system.model, rows, length), jnp.zeros((rows,), jnp.int32), present
    )
    spread = jnp.repeat(jnp.arange(rows), beams)
    wide = Memory(take_rows(memory.layers, spread, system.model), memory.mask[spread])

    def step(tokens, cache):
        return generator.decode_step(system.model, params, wide, cache, tokens, present[spread])

    def reorder(cache, index):
        return DecoderCache(take_rows(cache.layers, index, system.model), cache.position)

    tokens, scores = decoding.beam(step, reorder(cache, spread), first, length, beams, reorder)
    scores = jnp.where(present[:, None], scores, decoding.NEGATIVE)
    return tokens.reshape(batch, count * beams, length), scores.reshape(batch, count * beams)


def score_hypotheses(system, params, documents, hypotheses: Array) -> Array:
    """log p(y|x, z) of hypotheses [B, N, T] under every passage: [B, N, K], by teacher forcing, one n at a time."""
    batch, count = documents.log_prior.shape
    present = (documents.log_prior > marginals.ABSENT / 2).reshape(-1, 1)

    def output(states):
        return generator.apply(system.model, params, states, method="output")[0]

    def one(targets):  # [B, T] -> [B, K]
        targets = jnp.repeat(targets, count, axis=0)
        inputs = jnp.pad(targets, ((0, 0), (1, 0)))[:, :-1]
        segments = ((targets > 0) & present).astype(jnp.int32)
        states, _ = generator.apply(system.model, params, inputs, segments, documents.memory, method="decode")
        log_probs, _, _ = marginals.token_scores(states, targets, output)
        return jnp.where(targets > 0, log_probs, 0.0).sum(-1).reshape(batch, count)

    return jax.lax.map(one, hypotheses.swapaxes(0, 1)).swapaxes(0, 1)


def same(hypotheses: Array) -> Array:
    """Which hypotheses are equal: [B, N, T] -> [B, N, N] bool."""
    return (hypotheses[:, :, None] == hypotheses[:, None]).all(-1)


def ordered(hypotheses: Array, scores: Array) -> tuple[Array, Array]:
    """Both with the best first: [B, N, T], [B, N].

    As in ``decoding.beam`` those that end come before those that the limit cut off, whose score is of all answers that
    begin so; those that are none come last.
    """
    cut_off = ~(hypotheses == decoding.EOS).any(-1)
    order = jnp.lexsort((-scores, jnp.where(decoding.is_real(scores), cut_off, 2)), axis=-1)
    return jnp.take_along_axis(hypotheses, order[..., None], 1), jnp.take_along_axis(scores, order, 1)


def take_questions(system, documents, questions: Array):
    """Documents of those questions [Q] int32, which may repeat."""
    rows = passage_rows(questions, documents.log_prior.shape[1])
    memory = documents.memory
    memory = Memory(take_rows(memory.layers, rows, system.model), memory.mask[rows])
    return documents.replace(memory=memory, log_prior=documents.log_prior[questions])


def take_cache(system, cache, questions: Array):
    """A ``rag.Cache`` of those questions [Q] int32, which may repeat."""
    rows = passage_rows(questions, cache.log_weights.shape[1])
    return cache.replace(
        decoder=DecoderCache(take_rows(cache.decoder.layers, rows, system.model), cache.decoder.position),
        log_weights=cache.log_weights[questions],
        log_probs=None if cache.log_probs is None else cache.log_probs[questions],
    )


def passage_rows(questions: Array, count: int) -> Array:
    """Rows of the B * K passages of questions [Q]: [Q * K]."""
    return (questions[:, None] * count + jnp.arange(count)).reshape(-1)
