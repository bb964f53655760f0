"""Ordered choices of K out of n candidates: probabilities, samples, and the posterior over them (arXiv 2505.03075).

DRO's latent variable z = (z_1, ..., z_K) is an ordered choice of distinct candidates, the paper's document permutation,
with p(z|x) = prod_t p(z_t | z_<t, x). What a model contributes is a *scorer*: logits of the next candidate behind every
prefix of given choices. The E-step works on four numbers per choice, all natural logarithms:

* ``log_likelihood``, log p(y|x, z) of the whole answer; * ``log_prior``, log p(z|x);
* ``log_proposal``, log q(z) of the distribution that z was really drawn from, temperature and truncation included;
* and from them the weight w_i, proportional to p(y|x, z_i) p(z_i|x) / q(z_i).

Shapes: ... any leading axes, m samples or N enumerated choices, K places, n candidates. All float32, choices int32.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from expertrag_jax import decoding

Array = jax.Array
Scorer = Callable[[Array], Array]
"""Choices [..., m, K] -> logits [..., m, K, n]; those at place t depend on the choices before t only."""

IMPOSSIBLE = -1e30  # a candidate that was chosen before
ABSENT = -1e9  # a candidate that is not there: chosen only when no other is left

# p(z|x)


def without_repetition(logits: Array, choices: Array, present: Array | None = None) -> Array:
    """Rules out what was chosen before.

    Args:
      logits: [..., K, n] of the next candidate. choices: [..., K].
      present: [..., n] bool, broadcast against the leading axes; an absent candidate comes after all present ones.
    Returns:
      [..., K, n]
    """
    chosen = (choices[..., None] == jnp.arange(logits.shape[-1])).astype(jnp.int32)
    if present is not None:
        logits = jnp.where(present[..., None, :], logits, ABSENT)
    return jnp.where(jnp.cumsum(chosen, axis=-2) - chosen > 0, IMPOSSIBLE, logits)


def log_probability(logits: Array, choices: Array, present: Array | None = None) -> Array:
    """log p(z|x) = sum_t log p(z_t | z_<t, x) of given choices; arguments as in ``without_repetition`` -> [...]."""
    log_probs = jax.nn.log_softmax(without_repetition(logits, choices, present), axis=-1)
    return jnp.take_along_axis(log_probs, choices[..., None], axis=-1)[..., 0].sum(-1)


def proposal_log_probs(logits: Array, temperature: float, top_p: float) -> Array:
    """What sampling really draws from: log-softmax of logits / temperature, cut to the likeliest ``top_p`` [..., n]."""
    scaled = jax.nn.log_softmax(logits / temperature, axis=-1)
    kept = decoding.truncate(scaled, 0, top_p)
    return jax.nn.log_softmax(jnp.where(logits <= IMPOSSIBLE, IMPOSSIBLE, kept), axis=-1)


def extend(score: Scorer, choices: Array, draw: Callable[[Array, int], Array], present: Array | None = None) -> Array:
    """Fills choices [..., m, K] from left to right with ``draw(logits [..., m, n], place)``."""
    for place in range(choices.shape[-1]):
        logits = without_repetition(score(choices), choices, present)[..., place, :]
        choices = choices.at[..., place].set(draw(logits, place).astype(jnp.int32))
    return choices


def sample(
    score: Scorer, shape: tuple[int, ...], rng: Array, temperature: float = 1.0, top_p: float = 1.0,
    present: Array | None = None,
) -> tuple[Array, Array]:
    """Draws choices one place after the other.

    Args:
      shape: (..., m, K). temperature: > 0. top_p: at each place only the likeliest candidates that together have this
        much probability; below 1 the choices outside are never seen, and weights cannot make up for that.
      present: as in ``without_repetition``, with an axis for m.
    Returns:
      (choices [..., m, K], log_proposal [..., m])
    """

    def draw(logits, place):
        key = jax.random.fold_in(rng, place)
        return jax.random.categorical(key, proposal_log_probs(logits, temperature, top_p), axis=-1)

    choices = extend(score, jnp.zeros(shape, jnp.int32), draw, present)
    log_q = proposal_log_probs(without_repetition(score(choices), choices, present), temperature, top_p)
    return choices, jnp.take_along_axis(log_q, choices[..., None], axis=-1)[..., 0].sum(-1)


def greedy(score: Scorer, shape: tuple[int, ...], present: Array | None = None) -> Array:
    """The likeliest candidate at every place: choices of ``shape`` (..., m, K)."""
    return extend(score, jnp.zeros(shape, jnp.int32), lambda logits, _: logits.argmax(-1), present)


def enumerate_choices(candidates: int, places: int) -> np.ndarray:
    """All N = n! / (n - K)! choices, in lexicographic order: [N, K]."""
    return np.array(list(itertools.permutations(range(candidates), places)), np.int32)


# p(z|x, y)


def log_posterior(log_likelihood: Array, log_prior: Array) -> Array:
    """log p(z|x, y) over all N enumerated choices: [..., N] each."""
    return jax.nn.log_softmax(log_likelihood + log_prior, axis=-1)


def importance_weights(log_likelihood: Array, log_prior: Array, log_proposal: Array) -> Array:
    """Self-normalised weights of m samples, w_i proportional to p(y|x, z_i) p(z_i|x) / q(z_i): [..., m], sum 1."""
    return jax.nn.softmax(log_likelihood + log_prior - log_proposal, axis=-1)


def effective_sample_size(weights: Array) -> Array:
    """1 / sum_i w_i^2, between 1 (one sample has all the weight) and m: [..., m] -> [...]."""
    return 1.0 / jnp.square(weights).sum(-1)


def log_evidence(log_likelihood: Array, log_prior: Array, log_proposal: Array) -> Array:
    """log of the unbiased estimate of p(y|x) from m samples: [..., m] -> [...].

    In expectation a lower bound of log p(y|x), rising with m (arXiv 1509.00519, equation 8).
    """
    log_ratios = log_likelihood + log_prior - log_proposal
    return jax.nn.logsumexp(log_ratios, axis=-1) - jnp.log(log_ratios.shape[-1])


def lower_bound(log_q: Array, log_likelihood: Array, log_prior: Array) -> Array:
    """The evidence lower bound sum_z q(z) (log p(y|x, z) + log p(z|x) - log q(z)) over all N choices: -> [...].

    Equal to log p(y|x) where q is the posterior, which is what makes EM rise.
    """
    q = jnp.exp(log_q)
    return jnp.where(q > 0, q * (log_likelihood + log_prior - log_q), 0.0).sum(-1)


def expected(weights: Array, log_probs: Array) -> Array:
    """The M-step's sum_i w_i log p_i with constant weights: [..., m] each -> [...]."""
    return (jax.lax.stop_gradient(weights) * log_probs).sum(-1)
