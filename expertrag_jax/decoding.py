"""Greedy search, sampling and beam search over any cached step function.

A step function is ``step(tokens [N] int32, cache) -> (log_probs [N, V] float32, cache)``. Nothing else is
known about the model: the same loops decode a fresh system and a program read from an export. All loops have
static shapes and stop when every row has emitted EOS. Shapes: B rows, T steps, V vocabulary, W beams.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

EOS = 1
PAD = 0
NEGATIVE = -1e9

Step = Callable[[jax.Array, Any], tuple[jax.Array, Any]]
Choose = Callable[[jax.Array, jax.Array], jax.Array]


def generate(
    step: Step, cache: Any, first_log_probs: jax.Array, length: int, choose: Choose, active: jax.Array
):
    """Decodes from the log-probabilities of the first position.

    Args:
      step: the cached step function.
      cache: its state after the first position.
      first_log_probs: [B, V] float32, log-probabilities of the first token (a gate may have looked at them).
      length: T, tokens at most, EOS included.
      choose: (log_probs [B, V], step number) -> tokens [B] int32.
      active: [B] bool; an inactive row is padding and stays so.
    Returns:
      (tokens [B, T] int32, padded with 0 behind EOS; score [B] float32, the sum of the chosen
      log-probabilities)
    """
    rows = first_log_probs.shape[0]

    def emit(position, log_probs, tokens, score, live):
        token = jnp.where(live, choose(without_padding(log_probs), position), PAD).astype(jnp.int32)
        gained = jnp.take_along_axis(log_probs, token[:, None], axis=1)[:, 0]
        score = score + jnp.where(live, gained, 0.0)
        return token, tokens.at[:, position].set(token), score, live & (token != EOS)

    def body(carry):
        position, token, tokens, score, live, cache = carry
        log_probs, cache = step(token, cache)
        token, tokens, score, live = emit(position, log_probs, tokens, score, live)
        return position + 1, token, tokens, score, live, cache

    tokens = jnp.zeros((rows, length), jnp.int32)
    token, tokens, score, live = emit(0, first_log_probs, tokens, jnp.zeros(rows), active)
    carry = (jnp.asarray(1), token, tokens, score, live, cache)
    carry = jax.lax.while_loop(lambda c: (c[0] < length) & c[4].any(), body, carry)
    return carry[2], carry[3]


def without_padding(log_probs: jax.Array) -> jax.Array:
    """[..., V] with PAD ruled out: in the middle of an answer it would read as its end, and score as nothing."""
    return log_probs.at[..., PAD].set(NEGATIVE)


def greedy(step: Step, cache: Any, first_log_probs: jax.Array, length: int, active: jax.Array):
    """The likeliest token at every position; arguments and result as in ``generate``."""
    return generate(
        step, cache, first_log_probs, length, lambda log_probs, _: jnp.argmax(log_probs, -1), active
    )


def sample(
    step,
    cache,
    first_log_probs,
    length,
    active,
    rng,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
):
    """Ancestral sampling; arguments and result as in ``generate``.

    Args:
      rng: a PRNG key. temperature: divides the log-probabilities. top_k: keep the k likeliest (0: all).
      top_p: keep the smallest set of likeliest tokens whose probability reaches p (nucleus sampling, arXiv
        1904.09751).
    The score is the log-probability under the distribution that was neither tempered nor truncated.
    """

    def choose(log_probs, position):
        scaled = truncate(log_probs / temperature, top_k, top_p)
        return jax.random.categorical(jax.random.fold_in(rng, position), scaled, axis=-1)

    return generate(step, cache, first_log_probs, length, choose, active)


def truncate(log_probs: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """Sets all but the kept tokens to a large negative value; see ``sample``."""
    if top_k:
        limit = jax.lax.top_k(log_probs, min(top_k, log_probs.shape[-1]))[0][..., -1:]
        log_probs = jnp.where(log_probs < limit, NEGATIVE, log_probs)
    if top_p < 1.0:
        ordered = jnp.sort(log_probs, axis=-1, descending=True)
        probability = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        limit = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        log_probs = jnp.where(log_probs < limit, NEGATIVE, log_probs)
    return log_probs


def beam(
    step: Step, cache: Any, first_log_probs: jax.Array, length: int, beams: int, reorder, alpha: float = 0.0
):
    """Beam search with length penalty ((5 + n) / 6)^alpha (arXiv 1609.08144, equation 14).

    A hypothesis is finished when it ends in EOS. Finished ones come before those that the limit cut off.

    Args:
      step: over B * W rows. cache: state after the first position, repeated to B * W rows (row-major).
      first_log_probs: [B, V]. length: T, tokens at most, EOS included. beams: W.
      reorder: (cache, rows [B * W] int32) -> cache with those rows. alpha: >= 0.
    Returns:
      (tokens [B, W, T] int32, score [B, W] float32 length-penalised log-probability), best first; where there
      are fewer than W hypotheses, tokens are 0 and the score is ``NEGATIVE``.
    """
    rows, vocab = first_log_probs.shape

    def penalised(score, count):
        return score / ((5.0 + count) / 6.0) ** alpha

    def keep_finished(finished, tokens, score, position):
        """Merges candidates [B, 2W] that end here into the W best finished ones."""
        old_tokens, old_score = finished
        ends = (tokens[:, :, position] == EOS) & is_real(score)
        score = jnp.where(ends, penalised(score, position + 1.0), NEGATIVE)
        best, index = jax.lax.top_k(jnp.concatenate([old_score, score], 1), beams)
        return jnp.take_along_axis(jnp.concatenate([old_tokens, tokens], 1), index[..., None], 1), best

    def extend(position, log_probs, tokens, score, finished):
        """log_probs [B, W, V] -> the 2W best continuations, split into finished and live ones."""
        total = (score[..., None] + without_padding(log_probs)).reshape(rows, -1)
        best, index = jax.lax.top_k(total, min(2 * beams, total.shape[1]))
        parent, token = index // vocab, (index % vocab).astype(jnp.int32)
        grown = jnp.take_along_axis(tokens, parent[..., None], 1).at[:, :, position].set(token)
        finished = keep_finished(finished, grown, best, position)
        live, chosen = jax.lax.top_k(jnp.where(token == EOS, NEGATIVE, best), beams)
        parent = jnp.take_along_axis(parent, chosen, 1)
        return jnp.take_along_axis(grown, chosen[..., None], 1), live, parent, finished

    def body(carry):
        position, tokens, score, finished, cache = carry
        last = jax.lax.dynamic_index_in_dim(tokens, position - 1, axis=2, keepdims=False)
        log_probs, cache = step(last.reshape(-1), cache)
        log_probs = log_probs.reshape(rows, beams, vocab)
        tokens, score, parent, finished = extend(position, log_probs, tokens, score, finished)
        cache = reorder(cache, (parent + jnp.arange(rows)[:, None] * beams).reshape(-1))
        return position + 1, tokens, score, finished, cache

    def unfinished(carry):
        position, _, score, finished, _ = carry
        # Scores are <= 0: a live beam's penalised score is at best its score over the longest penalty.
        bound = penalised(score[:, 0], float(length))
        return (position < length) & jnp.any(bound > finished[1][:, -1])

    tokens = jnp.zeros((rows, beams, length), jnp.int32)
    score = jnp.full((rows, beams), NEGATIVE).at[:, 0].set(0.0)
    finished = (tokens, jnp.full((rows, beams), NEGATIVE))
    spread = jnp.broadcast_to(first_log_probs[:, None], (rows, beams, vocab))
    tokens, score, _, finished = extend(0, spread, tokens, score, finished)
    carry = (jnp.asarray(1), tokens, score, finished, cache)
    _, tokens, score, finished, _ = jax.lax.while_loop(unfinished, body, carry)
    score = jnp.where(is_real(score), penalised(score, float(length)), NEGATIVE)
    return finished_first(finished, (tokens, score))


def is_real(score: jax.Array) -> jax.Array:
    """Whether a beam's score belongs to a hypothesis; an empty beam's is about ``NEGATIVE``."""
    return score > NEGATIVE / 2


def finished_first(finished, live):
    """Finished hypotheses, then live ones: two pairs (tokens [B, W, T], score [B, W]), sorted -> one."""
    (done_tokens, done_score), (tokens, score) = finished, live
    beams = score.shape[1]
    done = is_real(done_score).sum(1, keepdims=True)
    place = jnp.arange(beams)[None, :]
    index = jnp.where(place < done, place, beams + place - done)
    score = jnp.take_along_axis(jnp.concatenate([done_score, score], 1), index, 1)
    tokens = jnp.take_along_axis(jnp.concatenate([done_tokens, tokens], 1), index[..., None], 1)
    return jnp.where(is_real(score)[..., None], tokens, PAD), score


def score_targets(step: Step, cache: Any, first_log_probs: jax.Array, targets: jax.Array) -> jax.Array:
    """Log-probability of given answers by the cached step, as teacher forcing gives it.

    Args:
      step, cache, first_log_probs: as in ``generate``.
      targets: [B, T] int32, ending in EOS, 0-padded; padding counts for nothing.
    Returns:
      [B] float32, nats.
    """

    def body(carry, token_pair):
        token, target = token_pair
        log_probs, cache = step(token, carry)
        return cache, jnp.take_along_axis(log_probs, target[:, None], axis=1)[:, 0]

    first = jnp.take_along_axis(first_log_probs, targets[:, :1], axis=1)[:, 0]
    _, rest = jax.lax.scan(body, cache, (targets[:, :-1].T, targets[:, 1:].T))
    return jnp.where(targets[:, 0] > 0, first, 0.0) + jnp.where(targets[:, 1:].T > 0, rest, 0.0).sum(0)
