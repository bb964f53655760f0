"""Documents as a latent variable: p(y|x) with the passage z summed out (RAG, arXiv 2005.11401, section 2.1).

Everything here is a pure function of scores and token log-probabilities. Shapes: B questions, K passages, T target
tokens, V vocabulary, D width of decoder states. A passage that is absent has log prior ``ABSENT``: exp gives exactly 0,
and sums with a few hundred nats stay finite, so its gradient is 0 and never NaN.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array
ABSENT = -1e9


def log_prior(scores: Array, present: Array, temperature: float = 1.0) -> Array:
    """log p(z|x), p(z|x) proportional to exp(d(z).q(x)), over the passages that are there (section 2.2).

    Args:
      scores: [B, K] float32 inner products. present: [B, K] bool.
      temperature: divides the scores; that of the retriever's training where its vectors have length 1.
    Returns:
      [B, K] float32, ``ABSENT`` where not present.
    """
    scores = jnp.where(present, scores / temperature, ABSENT)
    return jnp.where(present, jax.nn.log_softmax(scores, axis=-1), ABSENT)


def sequence_marginal(log_prior: Array, token_log_probs: Array, weights: Array) -> Array:
    """RAG-Sequence: log sum_z p(z|x) prod_i p(y_i|x, z, y_<i); one passage is responsible for the whole answer.

    Args:
      log_prior: [B, K]. token_log_probs: [B, K, T], log p(y_i|x, z, y_<i).
      weights: [B, T], 0 on padding.
    Returns:
      [B] float32, nats.
    """
    return jax.nn.logsumexp(log_prior + answer_log_probs(token_log_probs, weights), axis=-1)


def token_marginal(log_prior: Array, token_log_probs: Array, weights: Array) -> Array:
    """RAG-Token: sum_i log sum_z p(z|x) p(y_i|x, z, y_<i); every token may draw on another passage.

    Arguments and result as in ``sequence_marginal``.
    """
    each = jax.nn.logsumexp(log_prior[..., None] + token_log_probs, axis=1)
    return jnp.where(weights > 0, each * weights, 0.0).sum(-1)


def answer_log_probs(token_log_probs: Array, weights: Array) -> Array:
    """sum_i log p(y_i|x, z, y_<i) over the target: [B, K, T] and [B, T] -> [B, K]."""
    weights = weights[:, None]
    return jnp.where(weights > 0, token_log_probs * weights, 0.0).sum(-1)


def log_posterior(log_prior: Array, log_likelihood: Array) -> Array:
    """log p(z|x, y), by Bayes: [B, K] and [B, K] -> [B, K]."""
    return jax.nn.log_softmax(log_prior + log_likelihood, axis=-1)


def entropy(log_probs: Array) -> Array:
    """Of distributions over the last axis, in nats: [..., K] -> [...]; an ``ABSENT`` entry adds nothing."""
    return -(jnp.exp(log_probs) * log_probs).sum(-1)


def token_scores(states: Array, targets: Array, output: Callable[[Array], Array]) -> tuple[Array, Array, Array]:
    """What losses need to know of the logits, without all logits at once.

    One target position is worked on at a time, and its logits are computed again in the backward pass, so that the
    largest float32 array is [N, 1, V] and never [N, T, V].

    Args:
      states: [N, T, D], decoder states of N = B * K rows. targets: [N, T] int32.
      output: [N, 1, D] -> logits [N, 1, V] float32.
    Returns:
      (log p(target), mean over the vocabulary of log p, logsumexp of the logits), each [N, T] float32.
    """

    @functools.partial(jax.checkpoint, prevent_cse=False)  # scan keeps forward and backward apart by itself
    def position(state, target):
        logits = output(state[:, None])[:, 0]
        log_z = jax.nn.logsumexp(logits, axis=-1)
        # A masked sum, not a gather: it splits over a sharded vocabulary, and its gradient is no scatter.
        is_target = target[:, None] == jnp.arange(logits.shape[-1])
        return jnp.where(is_target, logits, 0.0).sum(-1) - log_z, logits.mean(-1) - log_z, log_z

    def body(_, inputs):
        return None, position(*inputs)

    _, scores = jax.lax.scan(body, None, (states.swapaxes(0, 1), targets.T))
    return tuple(score.T for score in scores)


def smoothed(target_log_probs: Array, mean_log_probs: Array, vocab: int, label_smoothing: float) -> Array:
    """Label smoothing of the generator alone: the target keeps 1 - s, the other V - 1 tokens share s.

    It replaces log p(y_i|x, z, y_<i) before the passages are summed out, so the prior is counted once and never
    smoothed. The constant entropy of the smoothed target is added, as in T5X, so a perfect prediction has 0.

    Args:
      target_log_probs, mean_log_probs: of ``token_scores``. vocab: V. label_smoothing: s in [0, 1).
    """
    if not label_smoothing:
        return target_log_probs
    low, high = label_smoothing / (vocab - 1), 1.0 - label_smoothing
    constant = -(high * jnp.log(high) + (vocab - 1) * low * jnp.log(low))
    return (high - low) * target_log_probs + low * vocab * mean_log_probs + constant
